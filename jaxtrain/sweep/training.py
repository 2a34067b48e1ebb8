"""Train the members of a sweep: one after the other, or in groups that train together."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jax.sharding import Mesh

from jaxtrain.core import redact
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.experiment import Experiment
from jaxtrain.sweep import lockstep
from jaxtrain.sweep import strategy as strategies
from jaxtrain.sweep.console import MemberConsole
from jaxtrain.sweep.members import Cell
from jaxtrain.sweep.programs import Setting
from jaxtrain.sweep.strategy import Chosen
from jaxtrain.sweep.table import Outcome
from jaxtrain.train import out_of_memory, session
from jaxtrain.train.run_folder import RunFolder
from jaxtrain.train.session import Session


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """Many runs of an experiment.

    Attributes:
      experiment: what is varied.
      cells: the runs (``members.expand``).
      session: settings of each run; its ``folder`` is that of the sweep, and its ``record`` has the overrides
        of the experiment.
      runs: the folder of the members' folders.
      strategy: how members train, one of ``strategies.STRATEGIES``.
    """

    experiment: Experiment
    cells: Sequence[Cell]
    session: Session
    runs: Path
    strategy: str = "auto"

    def folder(self, cell: Cell) -> Path:
        """Return the folder of a member."""
        return self.runs / cell.folder_name


def train(
    sweep: Sweep, settings: Sequence[Setting], alone: Callable[[], Sequence[Setting]], chosen: Chosen
) -> list[Outcome]:
    """Train the members; returns their outcomes in order."""
    number = {id(cell): n // _seeds(sweep) for n, cell in enumerate(sweep.cells)}
    shown: set[str] = set()
    outcomes: dict[int, Outcome] = {}
    if chosen.strategy != "sequential":
        outcomes = _train_together(sweep, alone(), number, chosen.strategy, shown)
    for cell in sweep.cells:
        if id(cell) not in outcomes:
            own = _session(sweep, cell, sweep.session.mesh, shown)
            outcomes[id(cell)] = _train_alone(own, cell, settings[number[id(cell)]])
    return [outcomes[id(cell)] for cell in sweep.cells]


def _seeds(sweep: Sweep) -> int:
    return len({cell.seed for cell in sweep.cells})


def _train_alone(own: Session, cell: Cell, setting: Setting) -> Outcome:
    try:
        with session.open_run(own, cell.experiment, setting.assemble) as opened:
            result = opened.stored_result(about=False) or opened.train()
    except (InputError, RunError) as error:  # of this member: all were assembled before
        own.console.note(f"failed: {error}")
        return _as_run_error(error)
    assert isinstance(own.console, MemberConsole)
    own.console.result(result)
    return result


def _train_together(
    sweep: Sweep, settings: Sequence[Setting], number: Mapping[int, int], how: str, shown: set[str]
) -> dict[int, Outcome]:
    """Train the members of each family together, with ``devices`` as many at a time as there are devices."""
    mesh = sweep.session.mesh
    outcomes: dict[int, Outcome] = {}
    alone = strategies.alone_mesh(mesh)
    families: dict[int, list[Cell]] = {}
    for cell in sweep.cells:
        if not (sweep.folder(cell) / "result.json").exists():
            families.setdefault(settings[number[id(cell)]].family, []).append(cell)
    for cells in families.values():
        size = len(cells) if how == "vmap" else mesh.size
        for start in range(0, len(cells), size):
            group = cells[start : start + size]
            found = _fit_group(
                sweep, [(cell, settings[number[id(cell)]]) for cell in group], alone, how, shown
            )
            outcomes |= dict(zip(map(id, group), found, strict=True))
    return outcomes


def _fit_group(
    sweep: Sweep, group: Sequence[tuple[Cell, Setting]], alone: Mesh, how: str, shown: set[str]
) -> list[Outcome]:
    """Train the members of a group together; returns their outcomes in order."""
    base, console, first = sweep.session, sweep.session.console, group[0][1].program
    outcomes: dict[int, Outcome] = {}
    with contextlib.ExitStack() as stack:
        members: list[lockstep.Member] = []
        which: dict[int, tuple[int, Setting, int]] = {}
        for number, (cell, setting) in enumerate(group):
            own = _session(sweep, cell, alone, shown)
            try:
                opened = stack.enter_context(session.open_run(own, cell.experiment, setting.assemble))
                opened.stored_result(about=False)  # shows its notes
                member = lockstep.Member(opened)
            except (InputError, RunError) as error:  # such as a damaged checkpoint, or one in use
                own.console.note(f"failed: {error}")
                outcomes[number] = _as_run_error(error)
                continue
            stack.callback(member.close)
            members.append(member)
            which[id(member)] = number, setting, cell.seed
        stack.enter_context(out_of_memory.explain_out_of_memory(first, base.name, base.folder.path, console))
        found = lockstep.fit(
            members,
            lambda chosen: strategies.make(how, [which[id(one)][1:] for one in chosen], alone, base.mesh),
            console,
            base.grace,
        )
        outcomes |= {which[id(member)][0]: one for member, one in zip(members, found, strict=True)}
    for number, outcome in sorted(outcomes.items()):
        if not isinstance(outcome, RunError):
            MemberConsole(console, group[number][0].label, shown).result(outcome)
    return [outcomes[number] for number in range(len(group))]


def _as_run_error(error: InputError | RunError) -> RunError:
    return error if isinstance(error, RunError) else RunError(str(error))


def _session(sweep: Sweep, cell: Cell, mesh: Mesh, shown: set[str]) -> Session:
    """Return the session of one member."""
    base = sweep.session
    settings = [redact.redact_setting(f"{path}={text}") for path, text in cell.settings.items()]
    overrides = [*base.record.get("overrides", ()), *settings, f"seed={cell.seed}"]
    return dataclasses.replace(
        base,
        folder=RunFolder(sweep.folder(cell)),
        mesh=mesh,
        console=MemberConsole(base.console, cell.label, shown),
        record={**base.record, "overrides": overrides},
    )
