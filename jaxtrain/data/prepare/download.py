"""Download the original files of a data set; fail fast without a network."""

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

# Called as progress(label, done, total); total is 0 if it is not known.
Progress = Callable[[str, int, int], None]

_MNIST_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
# Downloads are checked against checksums, so http and mirrors are fine.
URLS: dict[str, tuple[str, ...]] = {
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",),
    "mnist": tuple(f"https://storage.googleapis.com/cvdf-datasets/mnist/{f}" for f in _MNIST_FILES),
    "fashion_mnist": tuple(_FASHION + f for f in _MNIST_FILES),
}

_SOCKET_SECONDS = 5.0
# A DNS look-up has no timeout, and each address of a host may take the socket's.
_CONNECT_SECONDS = 8.0
_BLOCK = 1 << 20
_MAX_BYTES = 4 << 30  # The largest download, the photographs of pets, has 0.8 GB.


def fetch_members(original: Original, report: Progress) -> dict[str, bytes]:
    """Download and check every member of ``original``; return the contents by name.

    Raises:
      InputError: no network, or a download is not the original. The message names the files to download
        elsewhere and the command that takes them.
    """
    with fetch(original.name, URLS[original.name], report) as folder:
        return load_members(original, folder)


@contextlib.contextmanager
def fetch(name: str, urls: Sequence[str], report: Progress, parent: Path | None = None) -> Iterator[Path]:
    """Download ``urls`` to a temporary folder, yield it, and remove it on exit.

    Args:
      parent: where to create it; None: the system's temporary folder.

    Raises:
      InputError: no network. The message names the files to download elsewhere and the command that takes
        them. In an InputError of the caller, the folder's path is replaced by "downloaded".
    """
    prefix = "jaxtrain-" if parent is None else "incomplete.fetch-"  # The writer removes it after a kill.
    try:
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=prefix, dir=parent)
    except OSError as error:
        raise InputError(
            f"{name} cannot be downloaded: cannot create a temporary folder ({error})"
        ) from error
    with scratch as folder:
        for url in urls:
            try:
                _download(url, Path(folder), report)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise InputError(_unreachable(name, urls, url, error)) from error
        try:
            yield Path(folder)
        except InputError as error:
            # The folder is about to be removed, so its path means nothing to the user.
            raise InputError(str(error).replace(f"{folder}/", "downloaded ")) from error


def verify_checksum(path: Path, size: int | None, sha256: str | None) -> None:
    """Check the size and the checksum of a download; None: not known.

    Raises:
      InputError: it is not the original.
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
        f"cannot download {url} ({' '.join(str(reason).split())}): download {names} on a machine with "
        f"a network, then run: python -m jaxtrain prepare {name} --from DIR_OR_TAR"
    )


def _download(url: str, folder: Path, report: Progress) -> None:
    name = url.rsplit("/", 1)[1]
    with contextlib.closing(open_url(url)) as answer, (folder / name).open("wb") as file:
        total, done = int(answer.headers.get("Content-Length") or 0), 0
        while block := answer.read(_BLOCK):
            file.write(block)
            done += len(block)
            if done > _MAX_BYTES:
                raise OSError(f"it is larger than {_MAX_BYTES:,} bytes, unlike any original file")
            report(name, done, total)
    # Read in blocks, http.client reports no error when the connection is cut.
    if total and done != total:
        raise OSError(f"the connection ended after {done} of {total} bytes")


def open_url(url: str) -> Any:
    """Return an open response to ``url``, or raise OSError within 8 s, whatever the network does."""
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
        answer.close()  # It keeps the connection open.
    if isinstance(answer, Exception):
        raise answer
    return answer
