"""Unsafe archives: paths that lead out, links, devices and decompression bombs."""

from __future__ import annotations

import bz2
import io
import stat
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from jaxtrain.core.errors import InputError
from jaxtrain.data.prepare import archives, download


def tar_of(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    ("info", "why"),
    [
        (member("../x"), "leads out"),
        (member("a/../../x"), "leads out"),
        (member("/etc/x"), "leads out"),
        (member("a\\..\\x"), "leads out"),
        (member("x", tarfile.SYMTYPE, "/etc/passwd"), "link or a device"),
        (member("x", tarfile.LNKTYPE, "a"), "link or a device"),
        (member("x", tarfile.CHRTYPE), "link or a device"),
        (member("x", tarfile.FIFOTYPE), "link or a device"),
    ],
)
def test_unsafe_tar_members_are_refused(info, why, tmp_path):
    path = tar_of(tmp_path / "a.tar.gz", (member("a"), b"1"), (info, b""))
    with pytest.raises(InputError, match=why) as error:
        list(archives.entries(path))
    assert str(error.value).startswith(f"{path}: ") and "download it again" in str(error.value)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "link"])
def test_unsafe_zip_members_are_refused(name, tmp_path):
    path = tmp_path / "a.zip"
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK if name == "link" else stat.S_IFREG) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, "x")
    with pytest.raises(InputError, match=r"leads out|is a link"):
        list(archives.entries(path))


@pytest.fixture
def small(monkeypatch):
    """Patch the limits to small ones, in proportion to the real ones."""
    monkeypatch.setattr(archives, "_SLACK", 1 << 16)
    monkeypatch.setattr(archives, "_MAX_FILE", 1 << 17)


BOMB = bytes(1 << 22)


@pytest.mark.parametrize("kind", ["w:gz", "w:bz2", "w:xz", "zip"])
def test_decompression_bombs_are_refused(kind, tmp_path, small):
    path = tmp_path / "bomb"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a", BOMB)
    else:
        tar_of(path, (member("a"), BOMB), (member("b"), b"1"), mode=kind)
    with pytest.raises(InputError, match=r"bomb: expands to more than 20 times"):
        for entry in archives.entries(path):
            assert entry.path.name == "a"  # its bytes are skipped, not read


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_bomb_in_nested_archive_is_refused(mode, tmp_path, small):
    """A nested archive is an uncompressed tar, so the limit of the outer one covers it."""
    inner = tar_of(tmp_path / "inner", (member("a"), BOMB), mode=mode).read_bytes()
    path = tar_of(tmp_path / "outer.tar.gz", (member("inner.tar"), inner))
    with pytest.raises(InputError, match=r"outer.tar.gz: (inner.tar: not a complete|expands to more)"):
        for entry in archives.entries(path):
            list(entry.entries())


def test_bomb_in_a_member_name_is_refused(tmp_path, small):
    """tarfile reads a long name into memory, of any length."""
    path = tar_of(tmp_path / "a.tar.gz", (member("x" * (1 << 22)), b""))
    with pytest.raises(InputError, match="expands to more"):
        list(archives.entries(path))


def test_zip_is_read_no_further_than_its_claimed_sizes(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", BOMB)
    data, size = path.read_bytes(), len(BOMB).to_bytes(4, "little")
    assert data.count(size) == 2
    path.write_bytes(data.replace(size, (10).to_bytes(4, "little")))
    with pytest.raises(InputError, match="not a complete"):
        for entry in archives.entries(path):
            entry.read()


def test_size_of_one_file_is_capped(tmp_path, small):
    noise = np.random.default_rng(0).bytes(1 << 18)
    path = tar_of(tmp_path / "a.tar", (member("a"), noise), mode="w")
    with pytest.raises(InputError, match=r"'a' has more than 131,072 bytes"):
        for entry in archives.entries(path):
            entry.read()


def test_limits_leave_room_for_the_originals():
    """Text compresses best, about five times: far from 20 times and 64 MiB."""
    text = (ROOT / "README.md").read_bytes()
    assert len(text) / len(bz2.compress(text)) < archives._MAX_RATIO / 4
    assert archives._MAX_FILE >= 1 << 27 and archives._SLACK >= 1 << 26


def test_size_of_a_download_is_capped(tmp_path, monkeypatch):
    served = 0

    class Endless(io.BytesIO):
        headers: dict[str, str] = {}  # noqa: RUF012

        def read(self, size=-1):
            nonlocal served
            served += 1 << 16
            return bytes(1 << 16)

    monkeypatch.setattr(download, "open_url", lambda url: Endless())
    monkeypatch.setattr(download, "_MAX_BYTES", 1 << 20)
    with (
        pytest.raises(InputError, match=r"larger than 1,048,576 bytes"),
        download.fetch("x", ["http://h/a.tar"], lambda *_: None),
    ):
        pass
    assert served <= (1 << 20) + (1 << 16)
