"""Run a sweep: every member is an ordinary run in a folder of its own; the sweep's folder has the table."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxtrain import sharding
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.files import as_json, write_json
from jaxtrain.core.signals import Stopped
from jaxtrain.experiment import Experiment, config_hash
from jaxtrain.experiment import code as experiment_code
from jaxtrain.monitor import Console, make_console
from jaxtrain.monitor.hparams import write_hparams
from jaxtrain.monitor.trackers import settings as typed_settings
from jaxtrain.sharding import multihost
from jaxtrain.sweep import strategy as strategies
from jaxtrain.sweep.members import expand
from jaxtrain.sweep.programs import Setting, assemble_settings
from jaxtrain.sweep.strategy import Chosen
from jaxtrain.sweep.table import lines, tabulate
from jaxtrain.sweep.training import Sweep, train
from jaxtrain.train.run_folder import RunFolder
from jaxtrain.train.session import Session

FILE = "sweep.json"


def fit(
    experiment: Experiment,
    *,
    seeds: int = 1,
    grid: Mapping[str, Sequence[Any]] | None = None,
    folder: str | Path,
    mesh: Mesh | str | Mapping[str, int] | None = None,
    name: str = "experiment",
    strategy: str = "auto",
    console: Console | None = None,
) -> dict[str, Any]:
    """Train every combination of the values in ``grid`` with several seeds; resume what is not finished.

    As ``python -m jaxtrain sweep``: each member is an ordinary run, in a folder of its own inside ``folder``.

    Args:
      experiment: what is varied; its seed is the first one.
      seeds: seeds of each combination.
      grid: values by path, such as ``{"optimizer.lr": [0.05, 0.1]}``; as text, they are parsed. The first
        ones are the baseline.
      folder: the sweep's folder.
      mesh: as of ``jaxtrain.fit``.
      name: the experiment's name, for the records.
      strategy: how members train: ``"sequential"``, ``"vmap"``, ``"devices"`` or ``"auto"``.
      console: where progress is shown; None is a progress bar on a terminal or in a notebook, else lines.

    Returns, raises:
      As ``run``.

    >>> import tempfile
    >>> from jaxtrain import Experiment, data, losses, models, optim
    >>> from jaxtrain.monitor.console import Quiet
    >>> digits = Experiment(
    ...     model=models.MLP(widths=(32,), classes=10), train=data.Digits("train"), test=data.Digits("test"),
    ...     loss=losses.CrossEntropy(), optimizer=optim.Adam(lr=1e-3), batch=128, epochs=1,
    ... )
    >>> table = fit(digits, seeds=2, grid={"optimizer.lr": [1e-3, 1e-2]}, folder=tempfile.mkdtemp(),
    ...             strategy="sequential", console=Quiet())
    >>> [(row["settings"], row["n"]) for row in table["settings"]]
    [({'optimizer.lr': '0.001'}, 2), ({'optimizer.lr': '0.01'}, 2)]
    """
    script = experiment_code.main_module()
    texts = {}
    for path, values in (grid or {}).items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise InputError(f"grid[{path!r}] is {values!r}: give a list of values, such as [0.05, 0.1]")
        texts[path] = [str(value) for value in values]
    if "select" in texts:
        raise InputError("grid has select: a sweep compares one metric, the experiment's select")
    base = Session(
        name=name,
        folder=RunFolder(folder),
        mesh=sharding.as_mesh(mesh),
        console=make_console(quiet=not multihost.is_process_0()) if console is None else console,
        file=None if script is None else Path(str(script.__file__)),
        code=experiment_code.digests(script, experiment),
        grace=None,
    )
    cells = expand(experiment, texts, seeds)
    return run(Sweep(experiment=experiment, cells=cells, session=base, runs=Path(folder), strategy=strategy))


def run(sweep: Sweep) -> dict[str, Any]:
    """Train every member that is not finished, and return the table, which the console has shown.

    The same call resumes an interrupted sweep. A member that fails, such as by a loss that is not finite,
    does not end the others.

    Returns:
      What ``sweep.json`` holds: ``strategy`` and why, ``members``, and ``metric``, ``split`` and ``settings``
      of ``table.tabulate``.

    Raises:
      InputError: a setting, the data or the folder is wrong; the message is one line.
      RunError: the data cannot be read. A member that fails is in the table (``check``).
      Stopped: a signal asked for it; every member is saved.
    """
    base, console = sweep.session, sweep.session.console
    strategies.check(sweep.strategy, base.mesh, len(sweep.cells))
    known = multihost.on_process_0(lambda: _known(sweep), "sweep")
    experiments = [cell.experiment for cell in sweep.cells if cell.seed == sweep.experiment.seed]
    settings = assemble_settings(experiments, base.mesh)
    alone = functools.cache(lambda: _alone(experiments, settings, base.mesh))
    try:
        chosen = _choose(sweep, settings, alone, known)
        record = _record(sweep, chosen)
        console.note(f"{len(sweep.cells)} runs, {chosen.strategy}: {chosen.why}")
        _write(base.folder.path, record)
        outcomes = train(sweep, settings, alone, chosen)
    except Stopped as stopped:
        line = str(stopped).partition("; resume with")[0]
        raise Stopped(f"{line}; resume with: {base.resume_command}", stopped.signum) from None
    finally:
        for setting in settings:
            setting.program.close()
    table: dict[str, Any] = as_json(record | tabulate(sweep.cells, outcomes, sweep.experiment.select))
    _write(base.folder.path, table)
    if multihost.is_process_0():
        _write_hparams(sweep, outcomes)
    console.summary(base.name, {**lines(table), "folder": str(base.folder)})
    return table


def check(table: Mapping[str, Any]) -> None:
    """Raise RunError if a member has failed."""
    failed = [(row["settings"], each) for row in table["settings"] for each in row["failed"]]
    if failed:
        settings, first = failed[0]
        label = " ".join([*(f"{path}={text}" for path, text in settings.items()), f"seed={first['seed']}"])
        count = len(table["members"])
        raise RunError(f"{len(failed)} of {count} runs failed; the first: {label}: {first['why']}")


def _write_hparams(sweep: Sweep, outcomes: Sequence[Any]) -> None:
    """Write the settings and the test metrics of each member for TensorBoard's HParams page."""
    for cell, found in zip(sweep.cells, outcomes, strict=True):
        if isinstance(found, dict):
            values = typed_settings(cell.shown_settings)
            with contextlib.suppress(OSError):  # the result is written; TensorBoard only shows it
                write_hparams(sweep.folder(cell), values | {"seed": cell.seed}, found["test"])


def _write(folder: Path, record: dict[str, Any]) -> None:
    """Write ``sweep.json``; raises InputError if the folder cannot be written."""

    def write() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / FILE, record)
        except OSError as error:
            raise InputError(
                f"{folder} cannot be written ({error.strerror}): choose another --workdir"
            ) from error

    multihost.on_process_0(write, "sweep")


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
        return {}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{folder / FILE} cannot be read ({error}): choose another --workdir") from error
    raise InputError(f"{folder} holds a sweep of another experiment: choose another --workdir")


def _record(sweep: Sweep, chosen: Chosen) -> dict[str, Any]:
    members = [
        {
            "folder": os.path.relpath(sweep.folder(cell), sweep.session.folder.path),
            "settings": cell.shown_settings,
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


def _choose(
    sweep: Sweep,
    settings: Sequence[Setting],
    alone: Callable[[], Sequence[Setting]],
    known: Mapping[str, Any],
) -> Chosen:
    """Return the strategy: as asked for, as the sweep began, or measured."""
    if sweep.strategy in ("vmap", "devices") and settings[0].program.teacher is not None:
        raise InputError(
            f"--strategy {sweep.strategy}: distillation trains one run at a time; use sequential"
        )
    if sweep.strategy != "auto":
        return Chosen(sweep.strategy, "as asked for")
    if (before := known.get("strategy")) in strategies.STRATEGIES[1:]:
        if before != "sequential" and (
            problem := strategies.why_not(before, sweep.session.mesh, len(sweep.cells))
        ):
            return Chosen("sequential", f"it began with {before}, and now {problem}")
        why, seconds = known.get("why"), known.get("seconds_per_update")
        return Chosen(before, str(why), seconds if isinstance(seconds, dict) else {})
    if sweep.session.deterministic:
        return Chosen("sequential", "--deterministic")
    mesh = sweep.session.mesh
    seeds = sorted({cell.seed for cell in sweep.cells})
    return strategies.choose(settings, alone, seeds, mesh)


def _alone(experiments: Sequence[Experiment], settings: Sequence[Setting], mesh: Mesh) -> Sequence[Setting]:
    """Return the settings assembled on one device."""
    return settings if mesh.size == 1 else assemble_settings(experiments, strategies.alone_mesh(mesh))
