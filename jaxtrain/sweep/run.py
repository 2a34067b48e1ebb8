"""Run a sweep: every member is an ordinary run in a folder of its own; the sweep's folder has the table."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxtrain.core import redact
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.files import as_json, write_json
from jaxtrain.core.signals import Stopped
from jaxtrain.experiment import Experiment, config_hash
from jaxtrain.sharding import multihost
from jaxtrain.sweep import lockstep, strategy
from jaxtrain.sweep.console import MemberConsole
from jaxtrain.sweep.members import Cell
from jaxtrain.sweep.programs import Setting, assemble_settings
from jaxtrain.sweep.strategy import Chosen
from jaxtrain.sweep.table import Outcome, lines, tabulate
from jaxtrain.train import out_of_memory, session
from jaxtrain.train.run_folder import RunFolder
from jaxtrain.train.session import Session

FILE = "sweep.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """Many runs of an experiment.

    Attributes:
      experiment: what is varied.
      cells: the runs (``members.expand``).
      session: settings of each run; its ``folder`` is that of the sweep, and its ``record`` has the overrides
        of the experiment.
      runs: the folder of the members' folders.
      strategy: how members train, one of ``strategy.STRATEGIES``.
    """

    experiment: Experiment
    cells: Sequence[Cell]
    session: Session
    runs: Path
    strategy: str = "auto"

    def folder(self, cell: Cell) -> Path:
        """Return the folder of a member."""
        return self.runs / cell.folder_name


def run(sweep: Sweep) -> dict[str, Any]:
    """Train every member that is not finished, and return the table, which the console has shown.

    The same call resumes an interrupted sweep. A member that fails, such as by a loss that is not finite,
    does not end the others.

    Returns:
      What ``sweep.json`` holds: ``strategy`` and why, ``members``, and ``metric``, ``split`` and ``settings``
      of ``table.tabulate``.

    Raises:
      InputError: a setting, the data or the folder is wrong; the message is one line.
      RunError: no member has a result.
      Stopped: a signal asked for it; every member is saved.
    """
    base, console = sweep.session, sweep.session.console
    strategy.check(sweep.strategy, base.mesh, len(sweep.cells))
    known = multihost.on_process_0(lambda: _known(sweep), "sweep")
    experiments = [cell.experiment for cell in sweep.cells if cell.seed == sweep.experiment.seed]
    unfinished = [cell for cell in sweep.cells if not (sweep.folder(cell) / "result.json").exists()]
    settings = assemble_settings(experiments, base.mesh)
    try:
        chosen = _choose(sweep, settings, known) if unfinished else Chosen("sequential", "all are finished")
        record = _record(sweep, chosen)
        if unfinished:
            console.note(f"{len(sweep.cells)} runs, {chosen.strategy}: {chosen.why}")
            multihost.on_process_0(lambda: write_json(base.folder.path / FILE, record), "sweep")
        outcomes = _train(sweep, settings, chosen)
    except Stopped as stopped:
        line = str(stopped).partition("; resume with")[0]
        raise Stopped(f"{line}; resume with: {base.resume_command}", stopped.signum) from None
    finally:
        for setting in settings:
            setting.program.close()
    table = as_json(record | tabulate(sweep.cells, outcomes, sweep.experiment.select))
    multihost.on_process_0(lambda: write_json(base.folder.path / FILE, table), "sweep")
    console.summary(base.name, {**lines(table), "folder": str(base.folder)})
    failed = [
        f"{c.label}: {found}"
        for c, found in zip(sweep.cells, outcomes, strict=True)
        if isinstance(found, RunError)
    ]
    if failed:
        raise RunError(f"{len(failed)} of {len(sweep.cells)} runs failed; the first: {failed[0]}")
    return table


def _known(sweep: Sweep) -> dict[str, Any]:
    """Return ``sweep.json`` of the folder, empty where there is none; raise InputError if it is another's."""
    folder = sweep.session.folder.path
    try:
        known: dict[str, Any] = json.loads((folder / FILE).read_text())
        if known["hash"] == config_hash(sweep.experiment):
            return known
    except FileNotFoundError:
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no sweep: choose another --workdir") from None
        folder.mkdir(parents=True, exist_ok=True)
        return {}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{folder / FILE} cannot be read ({error}): choose another --workdir") from error
    raise InputError(f"{folder} holds a sweep of another experiment: choose another --workdir")


def _record(sweep: Sweep, chosen: Chosen) -> dict[str, Any]:
    members = [
        {
            "folder": str(sweep.folder(cell)),
            "settings": {
                path: redact.redact_setting(f"{path}={text}").partition("=")[2]
                for path, text in cell.settings.items()
            },
            "seed": cell.seed,
        }
        for cell in sweep.cells
    ]
    return {
        "experiment": sweep.session.name,
        "hash": config_hash(sweep.experiment),
        "strategy": chosen.strategy,
        "why": chosen.why,
        "seconds_per_update": chosen.seconds,
        "baseline": members[0]["settings"],
        "members": members,
    }


def _choose(sweep: Sweep, settings: Sequence[Setting], known: Mapping[str, Any]) -> Chosen:
    """Return the strategy: as asked for, as the sweep began, or measured."""
    if sweep.strategy != "auto":
        return Chosen(sweep.strategy, "as asked for")
    if known.get("strategy") in strategy.STRATEGIES[1:]:
        return Chosen(
            known["strategy"], f"as the sweep began ({known.get('why')})", known.get("seconds_per_update", {})
        )
    if sweep.session.deterministic:
        return Chosen("sequential", "--deterministic")
    mesh = sweep.session.mesh
    seeds = sorted({cell.seed for cell in sweep.cells})
    return strategy.choose(settings, _alone(sweep, settings), seeds, mesh)


def _alone(sweep: Sweep, settings: Sequence[Setting]) -> Sequence[Setting]:
    """Return the settings assembled on one device."""
    mesh = sweep.session.mesh
    if mesh.size == 1:
        return settings
    return assemble_settings([s.program.experiment for s in settings], strategy.alone_mesh(mesh))


def _train(sweep: Sweep, settings: Sequence[Setting], chosen: Chosen) -> list[Outcome]:
    """Train the members; returns their outcomes in order."""
    number = {id(cell): n // _seeds(sweep) for n, cell in enumerate(sweep.cells)}
    shown: set[str] = set()
    outcomes: dict[int, Outcome] = {}
    if chosen.strategy != "sequential":
        alone = _alone(sweep, settings)
        outcomes = _train_together(sweep, alone, number, chosen.strategy, shown)
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
    except RunError as error:
        own.console.note(f"failed: {error}")
        return error
    assert isinstance(own.console, MemberConsole)
    own.console.result(result)
    return result


def _train_together(
    sweep: Sweep, settings: Sequence[Setting], number: Mapping[int, int], how: str, shown: set[str]
) -> dict[int, Outcome]:
    """Train the members of each family together, with ``devices`` as many at a time as there are devices."""
    mesh = sweep.session.mesh
    outcomes: dict[int, Outcome] = {}
    alone = strategy.alone_mesh(mesh)
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
    console, first = sweep.session.console, group[0][1].program
    with contextlib.ExitStack() as stack:
        members: list[lockstep.Member] = []
        for cell, setting in group:
            own = _session(sweep, cell, alone, shown)
            opened = stack.enter_context(session.open_run(own, cell.experiment, setting.assemble))
            opened.stored_result(about=False)  # shows its notes
            member = lockstep.Member(opened)
            stack.callback(member.close)
            members.append(member)
        which = {
            id(member): (setting, cell.seed) for member, (cell, setting) in zip(members, group, strict=True)
        }
        stack.enter_context(
            out_of_memory.explain_out_of_memory(first, sweep.session.name, sweep.session.folder.path, console)
        )
        outcomes = lockstep.fit(
            members,
            lambda chosen: strategy.make(how, [which[id(one)] for one in chosen], alone, sweep.session.mesh),
            console,
            sweep.session.grace,
        )
    for (cell, _), outcome in zip(group, outcomes, strict=True):
        if not isinstance(outcome, RunError):
            MemberConsole(console, cell.label, shown).result(outcome)
    return outcomes


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
