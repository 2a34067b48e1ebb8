"""The persistent compilation cache: a private folder of the user, limited in size."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import jax
import pytest
from conftest import ROOT

from jaxtrain.core import cache
from jaxtrain.core.errors import InputError

SCRIPT = """
import jax
from jaxtrain.core import cache
cache.enable_compilation_cache(lambda line: print("warned:", line))
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if "cache_hit" in name else None)
jax.jit(lambda x: x + 1)(1.0)
print("hits", len(hits), "in", jax.config.jax_compilation_cache_dir)
"""


def start(**env):
    """Run a process without the cache settings of the tests."""
    kept = {k: v for k, v in os.environ.items() if "CACHE" not in k and k != "XDG_CACHE_HOME"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command, cwd=ROOT, env={**kept, **env}, capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout


@pytest.mark.full("tests/core/test_cache.py")
def test_programs_are_cached_in_a_private_folder_and_reused(tmp_path):
    first = start(XDG_CACHE_HOME=str(tmp_path))
    folder = tmp_path / "jaxtrain" / "compiled" / cache.cpu_kind()
    assert first == f"hits 0 in {folder}\n"
    assert [path.stat().st_mode & 0o777 for path in (folder, tmp_path / "jaxtrain")] == [0o700, 0o700]
    assert any(folder.iterdir())
    again = start(XDG_CACHE_HOME=str(tmp_path))
    assert "hits 0" not in again and str(folder) in again
    (tmp_path / "jaxtrain").chmod(0o777)  # others could put their own folder in its place
    output = start(XDG_CACHE_HOME=str(tmp_path))
    assert "WARNING: others can write to" in output and f"chmod 700 {tmp_path / 'jaxtrain'}\n" in output


@pytest.mark.full("tests/core/test_cache.py")
def test_jax_environment_variables_take_precedence(tmp_path):
    named = start(XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert named == f"hits 0 in {tmp_path / 'mine'}\n" and not (tmp_path / "jaxtrain").exists()
    off = start(XDG_CACHE_HOME=str(tmp_path), JAX_ENABLE_COMPILATION_CACHE="false")
    assert off == "hits 0 in None\n" and not (tmp_path / "jaxtrain").exists()


def test_an_unwritable_home_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    before, lines = jax.config.jax_compilation_cache_dir, []
    cache.enable_compilation_cache(lines.append)
    assert len(lines) == 1 and "compiled programs are not cached (Not a directory)" in lines[0]
    assert jax.config.jax_compilation_cache_dir == before


def test_user_folder_follows_xdg_cache_home(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard says to ignore
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache.user_folder("compiled") == Path("/home/someone/.cache/jaxtrain/compiled")


def test_trim_removes_the_least_recently_used(tmp_path):
    for k in range(10):
        path = tmp_path / str(k)
        path.write_bytes(bytes(100))
        os.utime(path, (1000 + k, 1000 + k))
    os.utime(tmp_path / "0", (5000, 900))  # written first, read last
    cache.trim(tmp_path, cap=1000)
    assert len(list(tmp_path.iterdir())) == 10
    cache.trim(tmp_path, cap=999)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "4", "5", "6", "7", "8", "9"]


@pytest.mark.parametrize("folder", ["missing", "damaged"])
def test_trim_ignores_missing_files(folder, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / folder)
    cache.trim(tmp_path, cap=0)
    assert list(tmp_path.iterdir()) == []  # the link itself is gone


def test_an_unknown_cache_setting_is_refused(monkeypatch):
    for value, off in (("off", True), ("OFF", True), ("", False)):
        monkeypatch.setenv("JAXTRAIN_CACHE", value)
        assert cache.is_disabled() is off
    monkeypatch.setenv("JAXTRAIN_CACHE", "/somewhere")
    with pytest.raises(InputError, match="JAXTRAIN_CACHE is /somewhere: set it to off, or unset it"):
        cache.is_disabled()


def test_programs_that_were_written_in_part_are_removed(tmp_path):
    whole = zlib.compress(os.urandom(1000))
    for name, data in {"whole": whole, "torn": whole[:-5], "empty": b"", "old": whole[:-5]}.items():
        (tmp_path / f"{name}-cache").write_bytes(data)
    (tmp_path / "other").write_bytes(b"")
    os.utime(tmp_path / "old-cache", (1, 1))
    (tmp_path / ".checked").touch()
    cache.remove_torn(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*")) == [
        ".checked",
        "old-cache",
        "other",
        "whole-cache",
    ]
    (tmp_path / ".checked").unlink()
    cache.remove_torn(tmp_path)
    assert not (tmp_path / "old-cache").exists() and (tmp_path / ".checked").exists()


def test_a_cache_that_cannot_be_written_is_one_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "shared"))
    monkeypatch.setattr(cache, "_can_write", lambda folder: False)
    lines = []
    cache.enable_compilation_cache(lines.append)
    assert lines == [], "a folder that is named may be shared, for reading only"
    # Otherwise JAX warns for every program.
    warnings.warn("Error writing persistent compilation cache entry for 'jit_f': OSError", stacklevel=1)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(jax.config, "update", lambda *args: None)
    cache.enable_compilation_cache(lines.append)
    assert (
        len(lines) == 1 and "cannot be written: compiled programs are read there and not stored" in lines[0]
    )
