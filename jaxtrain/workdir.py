"""A run's folder: what it is called, whose it is, and what it records about itself."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import secrets
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxtrain import __version__, names
from jaxtrain.checkpoint import write_json
from jaxtrain.errors import InputError, RunError
from jaxtrain.experiment import Experiment, config_hash, config_text, first_difference
from jaxtrain.optim import Constant, Schedule


def default(name: str, experiment: Experiment) -> Path:
    """``runs/NAME/HASH-seedS``: the same command finds the same folder on every host.

    Raises:
      InputError: the name of the experiment cannot name a folder.
    """
    own = f"{config_hash(experiment)}-seed{experiment.seed}"
    return names.inside(Path("runs"), name, own, what="experiment", fix="rename it, or give --workdir DIR")


def beside(workdir: Path) -> Path:
    """The first of ``WORKDIR``, ``WORKDIR-2``, ``WORKDIR-3``, ... that does not exist."""
    number, path = 2, workdir
    while path.exists():
        path = workdir.with_name(f"{workdir.name}-{number}")
        number += 1
    return path


def claim(
    workdir: Path, name: str, experiment: Experiment, record: dict[str, Any], extend: bool = False
) -> None:
    """Make ``workdir`` the folder of this run, or find that it already is.

    Args:
      workdir: the folder; made when it is missing.
      name: the experiment's name.
      experiment: what is to be run.
      record: JSON to keep beside the config (origin, overrides, devices).
      extend: allow a longer run although the schedule depends on the length.

    Raises:
      InputError: the folder holds another run, something else, or cannot be written.
    """
    config = config_text(experiment)
    known = load(workdir) if (workdir / "config.json").exists() else None
    if known is None and workdir.is_dir() and any(workdir.iterdir()):
        raise InputError(
            f"{workdir} is not empty and holds no run (no config.json): choose another --workdir"
        )
    if known is not None:
        _check_same(workdir, known["config"], experiment, extend)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        begins = record.get("init_from")
        if known is None or known["config"] != config or known.get("init_from") != begins:
            # Drawn once: tells this run's checkpoints from those of any other.
            run = (known or {}).get("run") or secrets.token_hex(8)
            text = {"name": name, "run": run, "hash": config_hash(experiment), **record, **_environment()}
            write_json(workdir / "config.json", {**(known or {}), **text, "config": config})
        probe = workdir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{workdir} cannot be written ({error.strerror}): choose another --workdir"
        ) from error


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keep every other process out of the run's folder while in this block.

    The kernel lets go of the lock when the process ends, however it ends. (Some network disks have no locks.)

    Raises:
      InputError: another process has the folder.
    """
    with (workdir / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise InputError(
                f"{workdir} is in use by another run ({file.read().strip() or 'unknown process'}): "
                "wait for it, stop it, or use --new"
            ) from error
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def load(workdir: Path) -> dict[str, Any]:
    """The run's ``config.json``.

    Raises:
      InputError: there is no run in the folder.
      RunError: the file is damaged.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise InputError(f"{workdir} holds no run (no config.json): give the folder a run printed")
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        begins = record.get("init_from") or ["", []]
        texts = [
            record["name"],
            *record["config"].values(),
            *record.get("overrides", ()),
            begins[0],
            *begins[1],
        ]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("it is not as it was written")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(f"{path} cannot be read ({error}): restore it from a copy") from error
    return record


def run_name(workdir: Path) -> str | None:
    """What tells this run from any other; None where it was begun without, by an older version."""
    return load(workdir).get("run") if (workdir / "config.json").exists() else None


def recorded_steps(workdir: Path) -> int:
    """The last step of which there is a record in ``metrics.jsonl``, 0 where there is none."""
    try:
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        return max((int(json.loads(line)["step"]) for line in lines if line.endswith("}")), default=0)
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def init_from(workdir: Path, source: str | None, renames: list[str]) -> list[Any] | None:
    """What a run begins with, ``[--init-from, --init-map]``; as recorded where it has begun. None is nothing.

    Raises:
      InputError: the run in ``workdir`` has begun with something else; or renames without a source.
    """
    if renames and source is None:
        raise InputError("--init-map renames what --init-from reads: give that too")
    asked = None if source is None else [source, renames]
    recorded = load(workdir).get("init_from") if (workdir / "config.json").exists() else None
    if not any(workdir.glob("checkpoints/*/manifest.json")):
        return asked or recorded
    if asked is not None and asked != recorded:
        raise InputError(
            f"{workdir} holds a run that began with {recorded[0] if recorded else 'no --init-from'}: "
            "choose another --workdir, or --new for a fresh run beside it"
        )
    return None if recorded is None else list(recorded)


def result(workdir: Path, steps: int) -> dict[str, Any] | None:
    """The result of a run that finished all ``steps``, None when it has not."""
    path = workdir / "result.json"
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        dict(found["test"]), float(found["seconds"]), found["examples_per_second"], found["resumed_from"]
        return found if found["steps"] == steps else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} cannot be read ({error}): delete it and run again") from error


def write_result(workdir: Path, found: dict[str, Any]) -> None:
    """Record the result of a finished run."""
    write_json(workdir / "result.json", found)


def _check_same(workdir: Path, old: dict[str, str], experiment: Experiment, extend: bool) -> None:
    """A resumed run may change how it is carried out, or grow longer; nothing else."""
    decides = config_text(experiment, operational=False)
    operational = config_text(experiment).keys() - decides.keys()
    before = {path: value for path, value in old.items() if path not in operational}
    before.setdefault("steps_per_dispatch", "'auto'")  # an older version's run, which had no such setting
    longer = float(decides["epochs"]) > float(before.get("epochs", "inf"))
    if longer and (extend or not _depends_on_length(experiment)):
        before["epochs"] = decides["epochs"]
    if (before.get("guard"), decides.get("guard")) == ("'stop'", "'skip'"):
        before["guard"] = decides["guard"]  # nothing was skipped so far: a run that skips had been the same
    difference = first_difference(before, decides)
    if difference is None:
        return
    path, was, now = difference
    fix = "choose another --workdir, or --new for a fresh run beside it"
    if path == "epochs" and longer:
        fix = "what it does depends on its length: --extend goes on with the longer schedule"
    raise InputError(f"{workdir} holds another run: {path} is {was} there and {now} here; {fix}")


def _depends_on_length(experiment: Experiment) -> bool:
    lr = getattr(experiment.optimizer, "lr", None)
    constant = isinstance(lr, Constant) and lr.warmup == 0
    frozen = any(group.until < 1 for group in getattr(experiment.optimizer, "groups", ()))
    built = any(hasattr(stage, "build") for stage in experiment.after)
    return (isinstance(lr, Schedule) and not constant) or frozen or built


def file_digest(origin: str) -> str | None:
    """Sixteen hex digits of what is in the file of an experiment; None where it has none of its own."""
    try:
        return hashlib.sha256(Path(origin).read_bytes()).hexdigest()[:16]
    except OSError:
        return None


def changes(workdir: Path, record: dict[str, Any]) -> list[str]:
    """What is no longer as it was when the run began, and no setting tells: versions, and the file's text.

    Args:
      workdir: the run's folder; a run that has not begun has no changes.
      record: what would be written into ``config.json`` now, with ``file``.
    """
    if not (workdir / "config.json").exists():
        return []
    before, now = load(workdir), _versions()
    then = before.get("versions") or {}
    told = [
        f"{name} was {then[name]} and is {now[name]}"
        for name in now
        if then.get(name, now[name]) != now[name]
    ]
    lines = (
        [f"{', '.join(told)}: from here on numbers may differ from those of an uninterrupted run"]
        if told
        else []
    )
    if before.get("file") and record.get("file") and before["file"] != record["file"]:
        lines.append(
            f"{record['origin']} has changed since this run began, and its settings have not: what code in "
            "it does may differ from here on"
        )
    return lines


def _environment() -> dict[str, Any]:
    return {"versions": _versions(), "git": _git_commit()}


def _versions() -> dict[str, str]:
    return {
        "jaxtrain": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "numpy")},
    }


def _git_commit() -> str | None:
    """The commit of the current folder, with ``-dirty`` when files differ from it; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
