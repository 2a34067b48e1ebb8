"""Fetching the original files of a data set, failing fast where there is no network."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import queue
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxtrain.core.errors import InputError
from jaxtrain.data.prepare.archives import load_members
from jaxtrain.data.prepare.originals import Original

# Called as progress(label, done, total); total is 0 when it is not known.
Progress = Callable[[str, int, int], None]

_MNIST_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
# Where the originals are fetched from. What arrives is checked, so http and mirrors are fine.
URLS: dict[str, tuple[str, ...]] = {
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",),
    "mnist": tuple(f"https://storage.googleapis.com/cvdf-datasets/mnist/{f}" for f in _MNIST_FILES),
    "fashion_mnist": tuple(_FASHION + f for f in _MNIST_FILES),
}

_SOCKET_SECONDS = 5.0
# Name look-up knows no timeout of its own, and each address of a host may take the socket's.
_CONNECT_SECONDS = 8.0
_BLOCK = 1 << 20
_MOST = 4 << 30  # The largest original that is fetched, the photographs of pets, has 0.8 GB.


def fetch_members(original: Original, report: Progress) -> dict[str, bytes]:
    """The checked contents of every member of ``original``, by name, from its ``URLS``.

    Raises:
      InputError: no network, or what arrived is not the original. The message names the files to
        fetch by other means and the command that takes them.
    """
    with fetch(original.name, URLS[original.name], report) as folder:
        return load_members(original, folder)


@contextlib.contextmanager
def fetch(name: str, urls: Sequence[str], report: Progress, parent: Path | None = None) -> Iterator[Path]:
    """A folder that holds what ``urls`` give, which is removed in the end.

    Args:
      parent: where to make it, for what is too big for the system's own place.

    Raises:
      InputError: no network. The message names the files to fetch by other means and the command
        that takes them. An InputError of the caller's that names a file here says ``fetch`` instead.
    """
    prefix = "jaxtrain-" if parent is None else "incomplete.fetch-"  # Swept up after a kill.
    try:
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=prefix, dir=parent)
    except OSError as error:
        raise InputError(f"{name} cannot be fetched: no place to write to ({error})") from error
    with scratch as folder:
        for url in urls:
            try:
                _download(url, Path(folder), report)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise InputError(_unreachable(name, urls, url, error)) from error
        try:
            yield Path(folder)
        except InputError as error:
            # The copy on disk is about to go: name what was fetched instead.
            raise InputError(str(error).replace(f"{folder}/", "fetched ")) from error


def check(path: Path, size: int | None, sha256: str | None) -> None:
    """Compares a fetched file with what is known of the original; None: not known.

    Raises:
      InputError: it is another file.
    """
    if size is not None and path.stat().st_size != size:
        found = path.stat().st_size
        raise InputError(f"{path} is not the original: expected {size} bytes, found {found}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if sha256 is not None else None
    if digest != sha256:
        raise InputError(f"{path} is not the original: expected sha256 {sha256}, found {digest}")


def _unreachable(name: str, urls: Sequence[str], url: str, error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    names = ", ".join(u.rsplit("/", 1)[1] for u in urls)
    return (
        f"cannot fetch {url} ({' '.join(str(reason).split())}): get {names} on a machine with a "
        f"network, then run: python -m jaxtrain prepare {name} --from DIR_OR_TAR"
    )


def _download(url: str, folder: Path, report: Progress) -> None:
    name = url.rsplit("/", 1)[1]
    with contextlib.closing(connect(url)) as answer, (folder / name).open("wb") as file:
        total, done = int(answer.headers.get("Content-Length") or 0), 0
        while block := answer.read(_BLOCK):
            file.write(block)
            done += len(block)
            if done > _MOST:
                raise OSError(f"it is larger than {_MOST:,} bytes, which no original is")
            report(name, done, total)
    # http.client ends a cut connection like a whole one when it is read by blocks.
    if total and done != total:
        raise OSError(f"the connection ended after {done} of {total} bytes")


def connect(url: str) -> Any:
    """An open response to ``url``; whatever the network does, an answer or OSError within 8 s."""
    answers: queue.Queue[Any] = queue.Queue(1)

    def call() -> None:
        try:
            answers.put(urllib.request.urlopen(url, timeout=_SOCKET_SECONDS))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=call, daemon=True).start()
    try:
        answer = answers.get(timeout=_CONNECT_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer in {_CONNECT_SECONDS:.0f} s") from None
    if isinstance(answer, urllib.error.HTTPError):
        answer.close()  # It holds the connection.
    if isinstance(answer, Exception):
        raise answer
    return answer
