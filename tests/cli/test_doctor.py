"""``python -m jaxtrain doctor``: the checks pass here, and the line about huge pages."""

from __future__ import annotations

import os
import re

import pytest

from jaxtrain.cli import doctor


def test_doctor_finds_no_problem_here(python):
    done = python("-m", "jaxtrain", "doctor", devices=8)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no problem found" in done.stdout and "second step" in done.stdout
    assert re.search(r"^  huge pages +\S", done.stdout, re.M)


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
