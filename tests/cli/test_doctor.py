"""``python -m jaxtrain doctor``: the checks pass here, and the line about huge pages."""

from __future__ import annotations

import os
import re

import pytest

from jaxtrain.cli import doctor
from jaxtrain.sharding import cards, described


@pytest.mark.full("tests/cli/test_cli.py::test_run_twice_then_new_then_evaluate")
def test_doctor_finds_no_problem_here(python):
    compiles = described.compiler_problem() is None
    done = python("-m", "jaxtrain", "doctor", *(["--for", "h100"] if compiles else []), devices=8)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^  program +compiled in \d+\.\d\d s$", done.stdout, re.M) or not compiles
    assert "no problem found" in done.stdout and "second step" in done.stdout
    assert re.search(r"^  huge pages +\S", done.stdout, re.M)


def test_doctor_says_how_to_compile_for_a_card(monkeypatch, capsys):
    monkeypatch.setattr(described, "compiler_problem", lambda: "needs XLA's GPU compiler: pip install it")
    problems = list[str]()
    rows = doctor._compile_for(cards.load_card("b200"), problems)
    assert rows == {"device": "NVIDIA B200, compute capability 10.0", "program": "not compiled"}
    reason = "compiling for b200 needs XLA's GPU compiler: pip install it"
    assert problems == [reason]
    assert doctor.main(["--for", "b20"]) == 2
    assert "--for b20: no card has this name: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mode", "libc", "tunables", "status"),
    [
        ("always [madvise] never", "glibc 2.36", "glibc.malloc.hugetlb=1", "enabled"),
        ("always [madvise] never", "glibc 2.36", "glibc.malloc.check=0:glibc.malloc.hugetlb=1", "enabled"),
        (
            "always [madvise] never",
            "glibc 2.36",
            "",
            "not enabled; to speed up steps on a CPU, start with GLIBC",
        ),
        ("always [madvise] never", "glibc 2.36", "glibc.malloc.hugetlb=0", "not enabled; "),
        ("[always] madvise never", "glibc 2.36", "", "enabled by the system for every process"),
        ("always madvise [never]", "glibc 2.36", "glibc.malloc.hugetlb=1", "disabled by the system ("),
        ("always [madvise] never", "glibc 2.34", "glibc.malloc.hugetlb=1", "not supported by glibc 2.34"),
        ("always [madvise] never", None, "glibc.malloc.hugetlb=1", "not supported by the C library"),
        (None, "glibc 2.36", "", "not supported by this system"),
    ],
)
def test_doctor_shows_the_huge_page_status(mode, libc, tunables, status, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "THP", tmp_path / "enabled")
    if mode is not None:
        doctor.THP.write_text(f"{mode}\n")
    monkeypatch.setattr(os, "confstr", lambda name: libc)
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    found = doctor.huge_page_status()
    assert found == status if status == "enabled" else found.startswith(status)
