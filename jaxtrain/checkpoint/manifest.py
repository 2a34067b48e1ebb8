"""The manifest of a checkpoint: its contents, and the checksums that detect damage."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.files import write_json

FORMAT = 2
READABLE = (1, 2)
"""Format 1 had neither checksums nor fingerprints: such a checkpoint is restored unverified."""


class CorruptCheckpointError(RunError):
    """A checkpoint differs from what was saved."""


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint: its step, its folder and its manifest.

    Attributes:
      step: number of updates before the save.
      folder: of this step.
      manifest: empty where it cannot be used.
      damage: why it cannot be used; None where the manifest is valid, whatever the state of the arrays.
    """

    step: int
    folder: Path
    manifest: dict[str, Any]
    damage: str | None = None

    @property
    def score(self) -> float | None:
        """The validation score (higher is better); None when it was not evaluated."""
        return self.manifest.get("score")

    @property
    def has_checksums(self) -> bool:
        """Whether the manifest has checksums and fingerprints."""
        return self.manifest.get("format") != 1


def read(folder: Path, step: int) -> CheckpointInfo:
    """Read the checkpoint in ``folder``; ``damage`` says what is wrong with its manifest."""
    path = folder / "manifest.json"
    if folder.is_symlink() or path.is_symlink():
        return CheckpointInfo(step, folder, {}, f"{(folder if folder.is_symlink() else path).name} is a link")
    try:
        manifest = json.loads(path.read_text())
        manifest["format"], dict(manifest["tree"]), float(manifest["score"] or 0)
        if manifest["format"] in READABLE and manifest.get("seal") != _expected_seal(manifest):
            return CheckpointInfo(step, folder, {}, "its manifest.json has been changed")
        if manifest["format"] in READABLE and manifest["step"] != step:
            return CheckpointInfo(step, folder, {}, f"its manifest.json is of step {manifest['step']}")
    except FileNotFoundError:
        return CheckpointInfo(step, folder, {}, "its manifest.json is missing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return CheckpointInfo(step, folder, {}, "its manifest.json cannot be read")
    return CheckpointInfo(step, folder, manifest)


def write(folder: Path, manifest: dict[str, Any]) -> None:
    """Complete the checkpoint in ``folder``: write its manifest, with the checksum of every file.

    Args:
      folder: of the step; Orbax has committed ``state`` in it.
      manifest: everything else, as JSON.
    """
    content = {**manifest, "files": {name: _checksum(path) for name, path in _files(folder).items()}}
    write_json(folder / "manifest.json", {**content, "seal": _expected_seal(content)})


def find_damage(saved: CheckpointInfo) -> str | None:
    """Describe the first file of a checkpoint that has changed since the save; None when none has.

    Reads every file, at about 1 GB/s. Other formats are not checked.
    """
    if saved.damage is not None or saved.manifest["format"] != FORMAT:
        return saved.damage
    there = _files(saved.folder)
    for name, (size, digest) in saved.manifest["files"].items():
        if name not in there:
            return f"the file {name} is missing"
        try:
            if (now := there[name].stat().st_size) != size:
                return f"the file {name} has {now:,} bytes instead of {size:,}"
            if _checksum(there[name])[1] != digest:
                return f"the file {name} has changed (its checksum differs)"
        except OSError as error:
            return f"the file {name} cannot be read ({error.strerror})"
    return None


def spec(leaf: Any) -> str:
    """Return dtype and shape as text, such as ``float32[4, 8]``."""
    return f"{leaf.dtype}{list(leaf.shape)}"


def parse_spec(text: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Parse the text of ``spec``: shape and dtype.

    >>> parse_spec("bfloat16[4, 8]")
    ((4, 8), dtype(bfloat16))
    """
    name, _, sizes = text.removesuffix("]").partition("[")
    shape = tuple(int(size) for size in sizes.split(",") if size)
    if name.startswith("key<"):
        keys = (jax.random.key(0, impl=impl).dtype for impl in ("threefry2x32", "rbg", "unsafe_rbg"))
        return shape, next(dtype for dtype in keys if str(dtype) == name)
    return shape, jnp.dtype(name)


def check_format(saved: CheckpointInfo) -> None:
    """Raise InputError unless this version can read the format of ``saved``."""
    known = saved.manifest.get("format")
    if known not in READABLE:
        raise InputError(
            f"checkpoint {saved.folder} has format {known!r} and this version reads "
            f"{' and '.join(map(str, READABLE))}: use the jaxtrain that wrote it "
            f"({saved.manifest.get('jaxtrain', 'unknown')})"
        )


def check_same(saved: CheckpointInfo, want: dict[str, Any]) -> None:
    """Raise InputError unless ``saved`` has exactly the arrays of ``want``, by path, shape and dtype.

    Orbax would cast and reshape silently, so the manifest is compared.
    """
    check_format(saved)
    there, here = saved.manifest["tree"], {path: spec(leaf) for path, leaf in want.items()}
    for path in [*here, *there]:
        if there.get(path) != here.get(path):
            raise InputError(
                f"checkpoint {saved.folder} is of another model: {path} is {there.get(path, 'absent')} there "
                f"and {here.get(path, 'absent')} here: restore the code of the run, or train anew with "
                "another --workdir or --new"
            )


def best(steps: list[CheckpointInfo]) -> CheckpointInfo | None:
    """Return the checkpoint with the highest score, the earliest of equals; None where none has a score."""
    scored = [(s.score, -s.step, s) for s in steps if s.score is not None]
    return max(scored, key=lambda one: one[:2])[2] if scored else None


def _expected_seal(manifest: dict[str, Any]) -> str | None:
    """Return the checksum of the rest of the manifest, such as the score; format 1 has none."""
    if manifest["format"] == 1:
        return None
    rest = {name: value for name, value in manifest.items() if name != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    """Return the plain files under ``state`` by name, sorted; follows no links."""
    found = {}
    top = folder / "state"
    for parent, _, names in os.walk(top) if not top.is_symlink() else ():
        for path in (Path(parent, name) for name in names):
            if path.is_file() and not path.is_symlink():
                found[path.relative_to(folder).as_posix()] = path
    return dict(sorted(found.items()))


def _checksum(path: Path) -> tuple[int, str]:
    """Return size and SHA-256, for which CPUs have instructions: it takes half the time of BLAKE2b."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return os.fstat(file.fileno()).st_size, digest
