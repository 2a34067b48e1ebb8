"""Folders of this user's cache, and the persistent compilation cache in one of them.

Compilation takes longer than anything else at the start of a run, and the next start needs the same programs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from jaxtrain.core.errors import InputError

CAP = 4 * 2**30  # bytes of compiled programs; the least recently used are removed first
CHECKED = 64 * 2**20  # bytes of compiled programs that a start checks at most
LEFT = 0.8  # fraction of the cap that is used after a removal


def user_folder(*names: str) -> Path:
    """Return the path ``jaxtrain/NAMES`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``, without creating it.

    Raises:
      RuntimeError: the user has no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base if base and Path(base).is_absolute() else Path.home() / ".cache", "jaxtrain", *names)


def make_private(folder: Path) -> bool:
    """Create ``folder`` with mode 0700 where it is missing; returns False where others can write to it.

    Raises:
      OSError: it cannot be created.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.stat()
    return not about.st_mode & 0o022 and about.st_uid in (0, os.getuid())


def is_disabled() -> bool:
    """Return whether ``JAXTRAIN_CACHE=off`` disables jaxtrain's caches.

    Raises:
      InputError: the variable has another value.
    """
    value = os.environ.get("JAXTRAIN_CACHE", "")
    if value.lower() not in ("", "off"):
        raise InputError(
            f"JAXTRAIN_CACHE is {value}: set it to off, or unset it "
            "(JAX_COMPILATION_CACHE_DIR chooses the folder)"
        )
    return value != ""


def private_folder(name: str) -> Path | None:
    """Create and return ``user_folder(name)``; None where caches are disabled or it would not be private."""
    if is_disabled():
        return None
    try:
        return user_folder(name) if make_private(user_folder()) and make_private(user_folder(name)) else None
    except (OSError, RuntimeError):
        return None


def enable_compilation_cache(warn: Callable[[str], None]) -> None:
    """Turn on JAX's persistent compilation cache.

    Its folder is ``JAX_COMPILATION_CACHE_DIR`` or, where that is not set, a private folder of this user for
    this kind of CPU, because programs contain its instructions. ``JAX_ENABLE_COMPILATION_CACHE=false``
    disables the cache; ``JAXTRAIN_CACHE=off`` does unless ``JAX_COMPILATION_CACHE_DIR`` is set. JAX runs
    what it finds in the folder, so nobody else may write to it.

    Args:
      warn: called with a line for the user.

    Raises:
      InputError: ``JAX_COMPILATION_CACHE_DIR`` cannot be created, or ``JAXTRAIN_CACHE`` has an unknown value.
    """
    import jax  # here: --list uses this module and does not wait for JAX

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
            warn(f"WARNING: others can write to {where}, and JAX runs the programs in it: {fix}")
            if not named:
                return
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no home folder"
        if named:
            raise InputError(
                f"JAX_COMPILATION_CACHE_DIR is {named}, which cannot be created ({reason}): set another"
            ) from error
        warn(
            f"compiled programs are not cached ({reason}): set JAX_COMPILATION_CACHE_DIR to a folder of yours"
        )
        return
    if not _can_write(folder):
        if not named:  # a named folder may be shared, for reading only
            warn(f"{folder} cannot be written: compiled programs are read there and not stored")
        warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")
    else:
        remove_torn(folder)
    if not named:
        trim(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def remove_torn(folder: Path) -> None:
    """Remove the programs that a killed process has written in part.

    JAX warns about them at every start, compiles again and does not replace them. Only what was written since
    the last call is read, the newest first and ``CHECKED`` bytes at most: milliseconds after a first run.
    """
    try:  # not public: the format is JAX's own
        from jax._src.compilation_cache import decompress_executable as decompress
    except ImportError:  # of another JAX
        return
    marker = folder / ".checked"
    since, now, size = 0.0, time.time(), 0
    with contextlib.suppress(OSError):
        since = marker.stat().st_mtime - 60  # clocks of network disks differ
    found = []
    for path in folder.glob("*-cache"):
        with contextlib.suppress(OSError):  # another process removes files too
            found.append((path.stat().st_mtime, path))
    for modified, path in sorted(found, reverse=True):
        if modified < since or size > CHECKED:
            break
        with contextlib.suppress(OSError):
            data = path.read_bytes()
            size += len(data)
            try:
                decompress(data)
            except Exception:  # of zlib or zstandard
                path.unlink()
    with contextlib.suppress(OSError):
        marker.touch()
        os.utime(marker, (now, now))


def _can_write(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def trim(folder: Path, cap: int = CAP) -> None:
    """Remove the least recently used files of ``folder`` when they are more than ``cap`` bytes together."""
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
    """Return eight hex digits for this kind of CPU; another may lack instructions that programs use."""
    text = platform.machine()
    with contextlib.suppress(OSError):
        lines = set(Path("/proc/cpuinfo").read_text(errors="replace").splitlines())
        text += "".join(
            sorted(line for line in lines if line.startswith(("model name", "flags", "Features")))
        )
    return hashlib.sha256(text.encode()).hexdigest()[:8]
