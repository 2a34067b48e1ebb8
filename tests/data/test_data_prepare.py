"""jaxtrain.data.prepare: written files match the originals bit for bit, and errors are one line."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fixtures_data import patch_checksums, tiny_files, write

from jaxtrain.core.errors import InputError
from jaxtrain.data.prepare import download, originals, prepare
from jaxtrain.data.tfds import TFDS

REPO = Path(__file__).resolve().parents[2]
NAMES = sorted(originals.ORIGINALS)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Write synthetic CIFAR-10 originals whose checksums are accepted."""
    files = tiny_files("cifar10")
    patch_checksums(monkeypatch, "cifar10", files)
    return write(tmp_path / "originals", files)


def tar(path: Path, files: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def error_message(name: str, **arguments: object) -> str:
    """Return the message of the InputError that ``prepare`` must raise: always one line."""
    with pytest.raises(InputError) as caught:
        prepare(name, **arguments)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def everything(name: str, split: str, root: Path) -> dict[str, np.ndarray]:
    source = TFDS(name, split, data_dir=str(root))
    return source.gather(np.arange(len(source)))


@functools.cache
def stock_order(split: str, count: int) -> np.ndarray:
    """Return positions in the original files, in the order of the stock TFDS data set."""
    from tensorflow_datasets.core import hashing

    hasher = hashing.Hasher(split)
    return np.array(sorted(range(count), key=hasher.hash_key))


# Formats of the originals.


@pytest.mark.parametrize("name", NAMES)
def test_originals_match_the_stock_builders(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import tensorflow_datasets as tfds

    files = tiny_files(name)
    patch_checksums(monkeypatch, name, files)
    folder = prepare(name, data_dir=tmp_path, source=write(tmp_path / "in" / "deep", files))
    assert folder == tmp_path / name / originals.ORIGINALS[name].version
    stock = tfds.builder_cls(name)
    parsed = originals.ORIGINALS[name].parse(files)
    for split, data in parsed.splits.items():
        got = everything(name, split, tmp_path)
        order = stock_order(split, len(data.images))
        assert np.array_equal(got["image"], data.images[order])
        for key, labels in data.labels.items():
            assert np.array_equal(got[key], labels[order])
    # The stock builder accepts it: version, features and splits agree.
    info = stock(data_dir=tmp_path).info
    assert folder.name == str(stock.VERSION) and list(info.splits) == ["train", "test"]
    written = tfds.builder_from_directory(folder).info.features
    assert {k: repr(v) for k, v in written.items()} == {k: repr(v) for k, v in info.features.items()}
    assert TFDS(name, data_dir=str(tmp_path)).classes == (100 if name == "cifar100" else 10)


@pytest.mark.parametrize("form", ["tar.gz", "tar", "tgz", "zip", "in folder", "gz", "no suffix"])
def test_source_formats(form: str, tiny: Path, tmp_path: Path) -> None:
    files = {f"some/where/{p.name}": p.read_bytes() for p in tiny.iterdir()}
    files["some/where/readme.html"] = b"ignored"
    source = tmp_path / f"archive.{form}"
    if form == "zip":
        with zipfile.ZipFile(source, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    elif form == "gz":
        source = write(tmp_path / "gz", {f"{Path(n).name}.gz": gzip.compress(d) for n, d in files.items()})
    elif form == "in folder":
        source = tmp_path / "downloads"
        source.mkdir()
        tar(source / "cifar-10-binary.tar.gz", files)
    else:
        tar(source, files, "w" if form == "tar" else "w:gz")
    prepare("cifar10", data_dir=tmp_path / "out", source=source)
    assert len(TFDS("cifar10", data_dir=str(tmp_path / "out"))) == 30


def test_files_of_another_data_set_are_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # MNIST and Fashion-MNIST use the same file names.
    write(tmp_path / "in" / "a_fashion", {k: v[::-1] for k, v in tiny_files("mnist").items()})
    patch_checksums(monkeypatch, "mnist", tiny_files("mnist"))
    write(tmp_path / "in" / "b_mnist", tiny_files("mnist"))
    prepare("mnist", data_dir=tmp_path, source=tmp_path / "in")
    mnist = TFDS("mnist", data_dir=str(tmp_path))
    labels = np.frombuffer(tiny_files("mnist")["train-labels-idx1-ubyte"][8:], np.uint8)
    assert sorted(mnist.gather(np.arange(len(mnist)))["label"]) == sorted(labels)


# Errors.


def test_one_flipped_bit_is_refused(tiny: Path, tmp_path: Path) -> None:
    path = tiny / "data_batch_3.bin"
    data = bytearray(path.read_bytes())
    data[4000] ^= 1
    path.write_bytes(data)
    message = error_message("cifar10", data_dir=tmp_path / "out", source=tiny)
    found = hashlib.md5(data).hexdigest()
    expected = originals.ORIGINALS["cifar10"].members[2].digest
    assert str(path) in message and f"expected md5 {expected}, found {found}" in message
    assert not TFDS("cifar10", data_dir=str(tmp_path / "out")).prepared()


def test_wrong_size_and_missing_file(tiny: Path, tmp_path: Path) -> None:
    path = tiny / "test_batch.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    message = error_message("cifar10", data_dir=tmp_path / "out", source=tiny)
    assert f"expected {len(data)} bytes, found {len(data) - 1}" in message
    path.unlink()
    message = error_message("cifar10", data_dir=tmp_path / "out", source=tiny)
    assert "test_batch.bin" in message and "data_batch_1.bin" not in message
    assert "no such file" in error_message("cifar10", data_dir=tmp_path, source=tmp_path / "nowhere")


def test_truncated_archive_is_refused(tiny: Path, tmp_path: Path) -> None:
    source = tar(tmp_path / "a.tar.gz", {p.name: p.read_bytes() for p in tiny.iterdir()})
    source.write_bytes(source.read_bytes()[:-20_000])
    assert str(source) in error_message("cifar10", data_dir=tmp_path / "out", source=source)
    source.write_bytes(b"<html>not found</html>")
    assert "not a complete" in error_message("cifar10", data_dir=tmp_path / "out", source=source)


@pytest.mark.parametrize("packed", [False, True])
def test_python_pickles_are_never_opened(packed: bool, tiny: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "boom"),)

    import pickle

    files = {f"cifar-10-batches-py/data_batch_{i}": pickle.dumps(Bomb()) for i in range(1, 6)}
    if packed:
        source = tar(tmp_path / "cifar-10-python.tar.gz", files)
    else:
        source = tmp_path / "cifar-10-batches-py"
        write(source, {Path(n).name: d for n, d in files.items()})
    message = error_message("cifar10", data_dir=tmp_path / "out", source=source)
    assert "binary version" in message
    assert not (tmp_path / "boom").exists()


def test_label_out_of_range(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = tiny_files("cifar10")
    files["data_batch_2.bin"] = b"\x0a" + files["data_batch_2.bin"][1:]
    patch_checksums(monkeypatch, "cifar10", files)
    source = write(tmp_path / "in", files)
    message = error_message("cifar10", data_dir=tmp_path / "out", source=source)
    assert "label 10 of example 6 is out of range" in message


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.setattr(socket, "socket", None)  # No network access.
    assert "did you mean cifar10" in error_message("cifer10", data_dir=tmp_path)
    assert "expected NAME" in error_message("hugging face:x", data_dir=tmp_path)
    assert "only cifar10:3.0.2" in error_message("cifar10:1.0.0", data_dir=tmp_path)
    message = error_message("svhn_cropped", data_dir=tmp_path)
    assert "pip install 'jaxtrain[prepare]'" in message


def test_unfinished_folder_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    arguments = {"data_dir": tmp_path / "out", "source": tiny}
    assert "no complete data set" in error_message("cifar10", **arguments)
    (folder / "features.json").write_text("{}")
    (folder / "dataset_info.json").write_text('{"fileFormat": "tfrecord"}')
    assert "holds tfrecord files" in error_message("cifar10", **arguments)
    assert not TFDS("cifar10", data_dir=str(tmp_path / "out")).prepared()


# Downloads.


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    folder = tmp_path / "www"
    folder.mkdir()
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()
        thread.join()


def test_download_with_progress(
    tiny: Path, tmp_path: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"x/{p.name}": p.read_bytes() for p in tiny.iterdir()}
    size = tar(server[0] / "cifar-10-binary.tar.gz", files).stat().st_size
    monkeypatch.setitem(download.URLS, "cifar10", (server[1] + "cifar-10-binary.tar.gz",))
    monkeypatch.setattr(download, "_BLOCK", 10_000)
    calls: list[tuple[str, int, int]] = []
    prepare("cifar10", data_dir=tmp_path / "out", progress=lambda *call: calls.append(call))
    downloads = [c for c in calls if c[0] == "cifar-10-binary.tar.gz"]
    assert len(downloads) > 3 and downloads[-1][1:] == (size, size)
    assert ("cifar10/train", 30, 30) in calls and ("cifar10/test", 6, 6) in calls
    assert len(TFDS("cifar10", data_dir=str(tmp_path / "out"))) == 30


def test_wrong_download_is_named(
    tiny: Path, tmp_path: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (server[0] / "cifar-10-binary.tar.gz").write_bytes(b"<html>sign in</html>")
    monkeypatch.setitem(download.URLS, "cifar10", (server[1] + "cifar-10-binary.tar.gz",))
    message = error_message("cifar10", data_dir=tmp_path / "out")
    assert message.startswith("downloaded cifar-10-binary.tar.gz")
    monkeypatch.setitem(download.URLS, "cifar10", (server[1] + "absent.tar.gz",))
    assert "File not found" in error_message("cifar10", data_dir=tmp_path / "out")


def test_no_network_fails_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    urls = tuple(f"http://127.0.0.1:{port}/{u.rsplit('/')[-1]}" for u in download.URLS["mnist"])
    monkeypatch.setitem(download.URLS, "mnist", urls)
    start = time.monotonic()
    message = error_message("mnist", data_dir=tmp_path)
    assert time.monotonic() - start < 5
    assert f"python -m jaxtrain prepare mnist --data-dir {tmp_path} --from DIR_OR_TAR" in message
    assert urls[0] in message and "t10k-labels-idx1-ubyte.gz" in message


def test_network_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: done.wait(10))
    monkeypatch.setattr(download, "_CONNECT_SECONDS", 0.2)
    assert download._SOCKET_SECONDS <= 5  # With 8 s to connect: under 10 s in all.
    start = time.monotonic()
    assert "no answer" in error_message("mnist", data_dir=tmp_path)
    assert time.monotonic() - start < 5
    done.set()


def test_cut_connection_is_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[Path, str]
) -> None:
    def cut(self: http.server.SimpleHTTPRequestHandler) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(b"x" * 50)

    monkeypatch.setattr(_Quiet, "do_GET", cut)
    monkeypatch.setitem(download.URLS, "cifar10", (server[1] + "cifar-10-binary.tar.gz",))
    assert "after 50 of 100000 bytes" in error_message("cifar10", data_dir=tmp_path)


# Atomic writes.


def test_idempotent_and_silent(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    folder = prepare("cifar10", data_dir=out, source=tiny, progress=lambda *call: print("progress", *call))  # noqa: T201
    stdout, stderr = capfd.readouterr()
    assert stderr == "" and {line.split()[0] for line in stdout.splitlines()} == {"progress"}
    stamps = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert prepare("cifar10", data_dir=out, source=tmp_path / "no longer there") == folder
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == stamps
    assert [p.name for p in out.rglob("*") if p.is_dir()] == ["cifar10", "3.0.2"]


def test_failure_leaves_no_files(tiny: Path, tmp_path: Path) -> None:
    def fail(label: str, done: int, total: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        prepare("cifar10", data_dir=tmp_path / "out", source=tiny, progress=fail)
    assert list((tmp_path / "out" / "cifar10").iterdir()) == []


_CHILD = """
import os, pathlib, signal, sys, time
sys.path[:0] = sys.argv[1:3]
import pytest
from fixtures_data import patch_checksums, tiny_files
from jaxtrain.data.prepare import prepare

root, mode, other = pathlib.Path(sys.argv[3]), sys.argv[4], int(sys.argv[5])
patch_checksums(pytest.MonkeyPatch(), "cifar10", tiny_files("cifar10"))

def progress(label, done, total):
    if mode == "die" and label == "cifar10/test":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "race" and label == "cifar10/test":
        (root / f"{1 - other}").touch()
        end = time.monotonic() + 60
        while not (root / f"{other}").exists() and time.monotonic() < end:
            time.sleep(0.01)

print(prepare("cifar10", data_dir=root / "out", source=root / "originals", progress=progress))
"""


def child(root: Path, mode: str, other: int = 0) -> subprocess.Popen:
    arguments = [str(REPO), str(REPO / "tests"), str(root), mode, str(other)]
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", _CHILD, *arguments], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.full("tests/data/test_data_prepare.py::test_failure_leaves_no_files")
def test_killed_halfway(tiny: Path, tmp_path: Path) -> None:
    killed = child(tmp_path, "die")
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not TFDS("cifar10", data_dir=str(tmp_path / "out")).prepared()
    (left,) = (tmp_path / "out" / "cifar10").iterdir()
    os.utime(left, (0, 0))
    for path in left.rglob("*"):
        os.utime(path, (0, 0))  # Old enough that no running process can own it.
    folder = prepare("cifar10", data_dir=tmp_path / "out", source=tiny)
    assert list(folder.parent.iterdir()) == [folder]
    assert len(everything("cifar10", "train", tmp_path / "out")["label"]) == 30


@pytest.mark.full("tests/data/test_data_prepare.py::test_failure_leaves_no_files")
def test_two_processes_at_once(tiny: Path, tmp_path: Path) -> None:
    # Each waits until the other is writing as well.
    both = [child(tmp_path, "race", 0), child(tmp_path, "race", 1)]
    printed = [process.communicate(timeout=90)[0].strip() for process in both]
    folder = tmp_path / "out" / "cifar10" / "3.0.2"
    assert [p.returncode for p in both] == [0, 0] and printed == [str(folder)] * 2
    assert list(folder.parent.iterdir()) == [folder]
    assert len(everything("cifar10", "train", tmp_path / "out")["label"]) == 30
