"""What is kept for this user from run to run: compiled programs above all.

Compiling takes longer than anything else at the start of a run, and the next start needs the same programs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
from collections.abc import Callable
from pathlib import Path

from jaxtrain.core.errors import InputError

CAP = 4 * 2**30  # bytes of compiled programs; the least recently used go first
LEFT = 0.8  # of the cap, after some were removed


def user_folder(*names: str) -> Path:
    """A folder of this user's own: ``jaxtrain/NAMES`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``.

    It is not made. Raises RuntimeError where the user has no home.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base if base and Path(base).is_absolute() else Path.home() / ".cache", "jaxtrain", *names)


def make_private(folder: Path) -> bool:
    """Make ``private_folder`` for this user alone where it is missing; False where others can write to it.

    Raises:
      OSError: it cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.stat()
    return not about.st_mode & 0o022 and about.st_uid in (0, os.getuid())


def is_disabled() -> bool:
    """Is nothing to be kept (``JAXTRAIN_CACHE=off``)?

    Raises:
      InputError: the variable says something else.
    """
    value = os.environ.get("JAXTRAIN_CACHE", "")
    if value.lower() not in ("", "off"):
        raise InputError(
            f"JAXTRAIN_CACHE is {value}: set it to off, or leave it out "
            "(a folder is named by JAX_COMPILATION_CACHE_DIR)"
        )
    return value != ""


def private_folder(name: str) -> Path | None:
    """``user_folder(name)``, made for this user alone; None where there is to be none, or cannot be.

    ``JAXTRAIN_CACHE=off`` keeps nothing of jaxtrain's own.
    """
    if is_disabled():
        return None
    try:
        return user_folder(name) if make_private(user_folder()) and make_private(user_folder(name)) else None
    except (OSError, RuntimeError):
        return None


def enable_compilation_cache(warn: Callable[[str], None]) -> None:
    """Keep compiled programs on the disk, and find those of earlier processes there.

    They are in ``JAX_COMPILATION_CACHE_DIR`` or, where that is not set, in a folder of this user and this
    kind of CPU, for whose instructions they are. ``JAX_ENABLE_COMPILATION_CACHE=false`` keeps none, and
    ``JAXTRAIN_CACHE=off`` none where it is not set. What is in the folder is run as it is found, so it must
    be this user's alone.

    Args:
      warn: takes a line that whoever runs this should read.

    Raises:
      InputError: ``JAX_COMPILATION_CACHE_DIR`` cannot be made, or ``JAXTRAIN_CACHE`` is no setting.
    """
    import jax  # here: what is kept is looked up by --list too, which does not wait for JAX

    named = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if is_disabled() and not named:
        return
    if "://" in named or not getattr(jax.config, "jax_enable_compilation_cache", True):
        return
    try:
        folder = Path(named) if named else user_folder("compiled", cpu_kind())
        open_to_others = [
            each for each in ((folder,) if named else (user_folder(), folder)) if not make_private(each)
        ]
        if open_to_others:
            where = "JAX_COMPILATION_CACHE_DIR" if named else str(open_to_others[0])
            fix = f"chmod 700 {shlex.join(map(str, open_to_others))}"
            warn(f"WARNING: others can write to {where}, and what is in it is run: {fix}")
            if not named:
                return
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        if named:
            raise InputError(
                f"JAX_COMPILATION_CACHE_DIR is {named}, which cannot be made ({reason}): set another"
            ) from error
        warn(f"compiled programs are not kept ({reason}): set JAX_COMPILATION_CACHE_DIR to a folder of yours")
        return
    if not named:
        trim(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def trim(folder: Path, cap: int = CAP) -> None:
    """Remove the least recently used files of ``folder`` until they are at most ``cap`` bytes together."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process removes files too
            about = path.stat(follow_symlinks=False)
            found.append((max(about.st_atime, about.st_mtime), about.st_size, path))
    total = sum(size for _, size, _ in found)
    if total <= cap:
        return
    for _, size, path in sorted(found):
        if total <= LEFT * cap:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            total -= size


def cpu_kind() -> str:
    """Eight hex digits of the kind of CPU: programs for one may hold instructions that another lacks."""
    text = platform.machine()
    with contextlib.suppress(OSError):
        lines = set(Path("/proc/cpuinfo").read_text().splitlines())
        text += "".join(
            sorted(line for line in lines if line.startswith(("model name", "flags", "Features")))
        )
    return hashlib.sha256(text.encode()).hexdigest()[:8]
