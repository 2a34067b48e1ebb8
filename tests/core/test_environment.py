"""Unusual environments: no home folder, a disk without locks, a closed or full stdout, an ASCII terminal."""

from __future__ import annotations

import errno
import io
import os
import pwd
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxtrain import run
from jaxtrain.cli import doctor
from jaxtrain.core import cache, files, redact
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.data.data_dir import default_data_dir
from jaxtrain.monitor import peak_flops
from jaxtrain.train import capacity, run_folder
from jaxtrain.train.run_folder import RunFolder


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id that the system does not know, without HOME."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR", "JAX_COMPILATION_CACHE_DIR", "JAXTRAIN_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.fixture
def deleted_folder(tmp_path: Path) -> Iterator[None]:
    """The current folder is deleted."""
    before, gone = Path.cwd(), tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    yield
    os.chdir(before)


@pytest.mark.usefixtures("no_home")
def test_without_a_home_folder_what_needs_it_says_so_and_the_rest_works() -> None:
    assert peak_flops.read_measured() == {}, "read at the end of every run"
    assert cache.private_folder("decoded") is None
    lines: list[str] = []
    cache.enable_compilation_cache(lines.append)
    assert lines == [
        "compiled programs are not cached (no home folder): set JAX_COMPILATION_CACHE_DIR to a folder of "
        "yours"
    ]
    with pytest.raises(InputError, match=r"^there is no home folder for data sets: set TFDS_DATA_DIR"):
        default_data_dir()
    with pytest.raises(InputError, match=r"^~/x\.csv: this user has no home folder: set HOME"):
        files.user_path("~/x.csv")
    problems: list[str] = []
    assert "working folder" in doctor._storage(problems)
    assert problems[0].startswith("data folder: there is no home folder")


@pytest.mark.usefixtures("deleted_folder")
def test_in_a_deleted_folder_absolute_paths_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list"]) == 0
    assert "digits_cnn" in capsys.readouterr().out
    assert files.user_path("/data") == Path("/data")
    with pytest.raises(InputError, match=r"^x\.csv: the current folder was deleted: change to another"):
        files.user_path("x.csv")
    with pytest.raises(InputError, match=r"^runs cannot be written"):
        capacity.check_folder(Path("runs"))


def test_temporary_folder_that_cannot_be_made_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.tempfile, "TemporaryDirectory", full)
    with pytest.raises(InputError, match=r"^no temporary folder .* \(No space left on device\): set TMPDIR"):
        files.temporary_folder("x-")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_a_warning(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(run_folder.fcntl, "flock", flock)
    lines: list[str] = []
    with RunFolder(tmp_path).locked(lines.append):
        assert f"pid {os.getpid()}" in (tmp_path / ".lock").read_text()
    assert lines == [f"{tmp_path} is on a disk without locks ({os.strerror(code)}): let no other run use it"]


def test_a_lock_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be written \(No such file or directory\): choose another"):
        RunFolder(tmp_path / "gone").locked().__enter__()


def test_a_folder_whose_name_is_not_utf8_is_refused() -> None:
    with pytest.raises(InputError, match=r"the name is not UTF-8: choose another --workdir"):
        capacity.check_folder(Path(os.fsdecode(b"/tmp/dat\xe4")))


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_what_an_ascii_terminal_lacks_is_escaped(errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", errors=errors))
    assert run.main(["--list"]) == 0
    assert rb"Handwritten 8\xd78 digits" in raw.getvalue()


def test_a_closed_stdout_swallows_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert run.main(["--list"]) == 0


def test_a_full_stdout_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert run.main(["--list"]) == RunError.exit_code
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # for what is still buffered
    assert capsys.readouterr().err == (
        "jaxtrain.run: stdout cannot be written (No space left on device): redirect it elsewhere\n"
    )


def test_a_full_stderr_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    with redact.redact_output():
        sys.stderr.write("lost")
    assert run.main(["--experiment", "no_such_name"]) == InputError.exit_code


def test_closed_files_are_reopened(python: Any, tmp_path: Path) -> None:
    """Otherwise a file that the run writes would become its stdout."""
    (tmp_path / "program.py").write_text(
        "import os, sys\nfrom jaxtrain import run\nos.close(0); os.close(1)\nsys.stdout = None\n"
        "run.main(['--list'])\nprint(os.readlink('/proc/self/fd/1'), file=sys.stderr)"
    )
    assert python(tmp_path / "program.py").stderr == "/dev/null\n"
