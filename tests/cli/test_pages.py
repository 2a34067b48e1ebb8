"""Huge pages: which commands start once more to get them, and that nobody notices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtrain.cli import huge_pages

GLIBC = "glibc 2.36"


@pytest.fixture
def started(monkeypatch, tmp_path):
    """``started(*words, mode=..., libc=...)``: what ``ask`` starts for ``python *words``, or None."""

    def start(
        *words, mode="always [madvise] never", libc=GLIBC, gpu=False, package="jaxtrain", **environment
    ):
        found = []
        for name in (huge_pages.VARIABLE, huge_pages.AGAIN, "JAX_PLATFORMS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        (tmp_path / "enabled").write_text(f"{mode}\n")
        monkeypatch.setattr(huge_pages, "GIVEN", tmp_path / "enabled")
        monkeypatch.setattr(huge_pages, "NVIDIA", tmp_path if gpu else tmp_path / "none")
        monkeypatch.setattr(os, "confstr", lambda name: libc)
        monkeypatch.setattr(os, "execve", lambda *call: found.append(call))
        own = words[words.index("--") + 1 :] if "--" in words else ()  # the command's own arguments
        monkeypatch.setattr(sys, "argv", ["x", *own])
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        monkeypatch.setattr(sys, "orig_argv", ["python", *(word for word in words if word != "--")])
        huge_pages.ask(package)
        return found[0] if found else None

    return start


RUN = ("-X", "dev", "-m", "jaxtrain.run", "--", "--experiment", "a b")


@pytest.mark.parametrize(
    "words",
    [
        RUN,
        ("-m", "jaxtrain", "--", "verify", "-m"),
        ("-mjaxtrain.run", "--", "--list"),
        ("-Wdefault", "-Im", "jaxtrain", "--", "doctor"),
    ],
)
def test_a_command_starts_again_with_its_own_words(started, words):
    path, arguments, environment = started(*words)
    assert (path, arguments[1:]) == (sys.executable, [word for word in words if word != "--"])
    assert environment["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert environment["PATH"] == os.environ["PATH"]


def test_the_installed_command_starts_again(started, tmp_path):
    assert started(str(tmp_path / "jaxtrain"), "--", "run") is not None
    assert started(str(tmp_path / "elsewhere" / "jaxtrain"), "--", "run") is None


def test_streams_may_be_closed(started, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert started(*RUN) is not None


def test_other_tunables_stay(started):
    environment = started(*RUN, GLIBC_TUNABLES="glibc.malloc.arena_max=2")[2]
    assert environment["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"


def test_no_process_starts_twice(started):
    # Where files have capabilities the system takes the tunable out again: this must not go on for ever.
    assert started(*RUN, **{huge_pages.AGAIN: str(os.getpid())}) is None
    assert huge_pages.AGAIN not in os.environ  # no process started from here is taken for this one
    assert started(*RUN, **{huge_pages.AGAIN: "1"}) is not None


@pytest.mark.parametrize(
    "words",
    [
        ("train.py", "--", "-m"),
        ("train.py", "--", "-m", "jaxtrain"),
        ("-", "--", "-m", "jaxtrain"),
        ("/usr/bin/pytest", "--", "-m", "not gpu"),
        ("/usr/bin/coverage", "run", "-m", "jaxtrain.run", "--", "--list"),
        ("-m", "pytest", "--", "-k", "jaxtrain"),
        ("-m", "cProfile", "-m", "jaxtrain.run"),
        ("-m", "jaxtrainer"),
        ("-c", "from jaxtrain import run; run.main([])", "--", "-m", "jaxtrain"),
        ("--help-all",),
        (),
    ],
)
def test_a_program_that_calls_jaxtrain_is_left_alone(started, words):
    assert started(*words) is None


def test_benchmarks_name_their_package(started):
    assert started("-m", "benchmarks.loop") is None
    assert started("-m", "benchmarks.loop", package="benchmarks") is not None


@pytest.mark.parametrize(
    ("system", "told"),
    [
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, "asked for"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "as GLIBC_TUNABLES says"),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=0:glibc.malloc.hugetlb=2"}, "as GLIBC_TUNABLES says"),
        ({"mode": "[always] madvise never"}, "given without asking"),
        ({"mode": "always madvise [never]"}, "switched off by the system"),
        ({"libc": "glibc 2.34"}, "glibc 2.34 does not ask for them"),
        ({"libc": None}, "the C library does not ask for them"),
        ({"gpu": True}, "left to the system, because of the GPU"),
    ],
)
def test_nothing_is_started_where_it_is_no_use(started, system, told):
    assert started(*RUN, **system) is None
    assert huge_pages.told() == told


def test_a_machine_without_the_setting_has_none(started, monkeypatch):
    started(*RUN)
    monkeypatch.setattr(huge_pages, "GIVEN", Path("/nowhere"))
    assert huge_pages.told() == "none on this system"


def test_jax_may_be_kept_from_the_gpu(started):
    assert started(*RUN, gpu=True, JAX_PLATFORMS="cpu") is not None


def test_a_system_that_starts_nothing_goes_on(started, monkeypatch):
    started(*RUN)

    asked = []

    def refused(*call):
        asked.append(call)
        raise OSError("no more memory")

    monkeypatch.setattr(os, "execve", refused)
    huge_pages.ask()
    assert len(asked) == 1


@pytest.mark.skipif(
    huge_pages.told() not in ("not asked for", "asked for"), reason=f"here: {huge_pages.told()}"
)
def test_a_process_keeps_its_id_input_and_exit_code(tmp_path):
    # Started again, the command finds the tunable; the file it runs first says which process it is.
    (tmp_path / "told.py").write_text(
        "import os, sys\nprint(os.getpid(), os.environ.get('GLIBC_TUNABLES'), sys.stdin.read())\n"
        "raise SystemExit(7)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != huge_pages.VARIABLE}
    words = [sys.executable, "-m", "jaxtrain.run", "--experiment", str(tmp_path / "told.py")]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        out, _ = process.communicate("typed")
    assert out == f"{process.pid} glibc.malloc.hugetlb=1 typed\n"
    assert process.returncode == 7
