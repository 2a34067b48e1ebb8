"""Keep secrets out of a run's records and out of its output.

A setting or an environment variable is a secret when its name contains ``token``, ``key``, ``secret``,
``password`` or the like and its value is text. So are the user and password in a URL, and such parameters
of its query.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import re
import sys
import threading
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from jaxtrain.core.errors import RunError

MARK = "<redacted>"
SHORTEST = 6  # characters; masking shorter texts would remove "true" and "image" from every line

_WORDS = "token|key|secret|password|passwd|passphrase|credential"
_SECRET = re.compile(_WORDS, re.IGNORECASE)
_CHOSEN_BY_PEOPLE = re.compile("secret|pass|credential", re.IGNORECASE)
_USER = re.compile(r"(?<=://)[^/\s?#'\"]+(?=@)")
_QUERY = re.compile(
    rf"([?&;][\w.%-]{{0,64}}(?:{_WORDS}|signature)[\w.%-]{{0,64}}=)[^&;#\s'\"]+", re.IGNORECASE
)
# token="..." in a line of source, which a traceback shows, and "token": "..." in a dict.
_QUOTED = re.compile(
    rf"((?:{_WORDS})[\w.-]{{0,64}}(?:\s?=|['\"]\s?:)\s?)(['\"])(?:\\.|(?!\2)[^\\])+\2", re.IGNORECASE
)
_LOCK = threading.RLock()  # two threads in one TextIOWrapper.write have crashed CPython 3.11
_known: set[str] = set()  # texts to mask; global, because a process has one output


def is_secret(name: str) -> bool:
    """Return whether a setting or an environment variable of this name holds a secret.

    >>> [is_secret(name) for name in ("api_key", "HF_TOKEN", "vocab", "name")]
    [True, True, False, False]
    """
    return _SECRET.search(name) is not None


def register(value: str) -> None:
    """Mask ``value`` in everything printed from now on, also quoted for a URL or by ``repr``."""
    for line in value.splitlines():
        for form in (line, urllib.parse.quote(line, safe=""), urllib.parse.unquote(line), repr(line)[1:-1]):
            if len(form.strip()) >= SHORTEST and MARK not in form:
                _known.add(form.strip())


def placeholder(name: str, values: Sequence[str]) -> str:
    """Return the text that stands in a record for the secret setting ``name``, and mask its values.

    A token is long and random, or no secret at all (``label_key="fine"``). So its placeholder has 32 bits of
    a slow digest: two runs that differ in it have different hashes. A password could be guessed from one.

    >>> placeholder("password", ["hunter2"]), placeholder("api_key", ["5bd91e77a0"])
    ('<redacted>', '<redacted efeb2708>')
    """
    for value in values:
        register(value)
    if _CHOSEN_BY_PEOPLE.search(name):
        return MARK
    return f"<redacted {_digest(name.rpartition('.')[2], tuple(values))}>"


def redact_urls(text: str) -> str:
    """Mask the users and passwords of the URLs in ``text``, and the secrets in their queries.

    >>> redact_urls("cannot fetch https://me:hunter2@host/x?page=2&token=abc")
    'cannot fetch https://<redacted>@host/x?page=2&token=<redacted>'
    """
    if "://" not in text:
        return text
    for user in _USER.findall(text):
        register(user.rpartition(":")[2])
    return _QUERY.sub(rf"\1{MARK}", _USER.sub(MARK, text))


def redact_setting(pair: str) -> str:
    """Return an override ``path=value`` as it may be shown and recorded; mask its value if it is a secret.

    >>> redact_setting("train.token=5bd91e77a0"), redact_setting("batch=64")
    ('train.token=<redacted>', 'batch=64')
    """
    path, _, value = pair.partition("=")
    names = [name for name in path.split(".") if not name.isdigit()]  # tokens.0 is an item of tokens
    if not names or not is_secret(names[-1]) or value.lower() in ("", "none", "null"):
        return redact_urls(pair)
    register(value.strip("'\""))
    return f"{path}={MARK}"


def redact(text: str) -> str:
    """Mask the registered secrets in ``text``, and what looks like one: in a URL, or ``token="..."``."""
    for value in sorted(_known, key=len, reverse=True):
        text = text.replace(value, MARK)
    return _QUOTED.sub(rf"\1\2{MARK}\2", redact_urls(text))


@contextlib.contextmanager
def redact_output() -> Iterator[None]:
    """Redact what this block writes to ``sys.stdout`` and ``sys.stderr``."""
    for name, value in os.environ.items():
        if is_secret(name) and not os.path.exists(value):  # noqa: PTH110 - Path raises for long ones
            register(value)
    with Path(os.devnull).open("w") as null:  # sys.stdout is None where it is closed
        out = _RedactedStream(sys.stdout or null, "stdout")
        err = _RedactedStream(sys.stderr or null, "stderr")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield


class _RedactedStream:
    """A stream that writes everything through ``redact``, and escapes what its encoding lacks."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name
        # In a C locale ``errors`` is "surrogateescape", which still fails for what ASCII lacks.
        strict = ("strict",) if stream.encoding == "utf-8" else ("strict", "surrogateescape")
        if isinstance(stream, io.TextIOWrapper) and stream.errors in strict:
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with _LOCK, self._errors():
            self._stream.write(redact(text))
        return len(text)

    def flush(self) -> None:
        with self._errors():
            self._stream.flush()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise RunError where stdout cannot be written; errors of stderr have nowhere to go."""
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            if self._name == "stdout":
                raise RunError(
                    f"stdout cannot be written ({error.strerror}): redirect it elsewhere"
                ) from error

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@functools.lru_cache(maxsize=256)
def _digest(name: str, values: tuple[str, ...]) -> str:
    """Return 32 bits in hexadecimal; slow on purpose (30 ms), against guessing."""
    value = repr(values).encode()
    return hashlib.pbkdf2_hmac("sha256", value, b"jaxtrain " + name.encode(), 100_000, dklen=4).hex()
