"""Secrets: which settings hold one, what stands for them in a run's records, and output without them.

A setting holds a secret when its name has ``token``, ``key``, ``secret``, ``password`` or the like in it and
its value is text. So does the part of a URL before its host.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import sys
import threading
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

MARK = "<redacted>"

_WORDS = "token|key|secret|password|passwd|passphrase|credential"
_SECRET = re.compile(_WORDS, re.IGNORECASE)
# Such are long and random, or no secrets at all (label_key="fine"): a digest gives nothing away, and tells
# two runs apart. What people choose themselves could be guessed from one.
_RANDOM = re.compile("token|key", re.IGNORECASE)
_CHOSEN = re.compile("secret|pass|credential", re.IGNORECASE)
_USER = re.compile(r"(?<=://)[^/\s?#'\"]+(?=@)")
_QUERY = re.compile(
    rf"([?&;][\w.%-]{{0,64}}(?:{_WORDS}|signature)[\w.%-]{{0,64}}=)[^&;#\s'\"]+", re.IGNORECASE
)
# token="..." in a line of source or a repr, and "token": "..." in a dict.
_QUOTED = re.compile(
    rf"((?:{_WORDS})[\w.-]{{0,64}}(?:\s?=|['\"]\s?:)\s?[bru]?)(['\"])(?!<redacted)(?:\\.|(?!\2)[^\\])+\2",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(\bbearer\s+|authorization:\s*\w+\s+)[\w.~+/=-]{8,}", re.IGNORECASE)
_SHORTEST = 6  # a shorter one would take "true" and "image" out of every line
_SHORTEST_IN_ENVIRONMENT = 8  # where much is called key and is none

_WRITING = threading.RLock()  # two threads in one TextIOWrapper.write have crashed CPython 3.11
_known: set[str] = set()  # what must not be printed: a process has one output


def is_secret(name: str) -> bool:
    """Does a setting of this name hold a secret, where its value is text?

    >>> [is_secret(name) for name in ("api_key", "HF_TOKEN", "vocab", "name")]
    [True, True, False, False]
    """
    return _SECRET.search(name) is not None


def register_secret(name: str, values: Sequence[str]) -> str:
    """What stands in a record for the text of a secret setting; ``redact`` masks it from now on.

    A token's or key's has 32 bits of a slow digest, so that two of them differ in a run's hash.

    >>> register_secret("password", ["hunter2"]), register_secret("api_key", ["5bd91e77a0"])
    ('<redacted>', '<redacted efeb2708>')
    """
    for value in values:
        register_secrets(value)
    if _CHOSEN.search(name) or not _RANDOM.search(name):
        return MARK
    return f"<redacted {_digest(name.rpartition('.')[2], tuple(values))}>"


def register_secrets(value: str, shortest: int = _SHORTEST) -> None:
    """Mask ``value`` in all that ``redact`` is given from now on, also quoted for a URL or by ``repr``."""
    for line in value.splitlines():
        for form in (line, urllib.parse.quote(line, safe=""), urllib.parse.unquote(line), repr(line)[1:-1]):
            if len(form.strip()) >= shortest and MARK not in form:
                _known.add(form.strip())


def redact_urls(line: str) -> str:
    """``line`` without the users and passwords of the URLs in it, and the secrets in their queries.

    >>> redact_urls("cannot fetch https://me:hunter2@host/x?page=2&token=abc")
    'cannot fetch https://<redacted>@host/x?page=2&token=<redacted>'
    """
    if "://" not in line:
        return line
    for user in _USER.findall(line):
        register_secrets(user.rpartition(":")[2])
    return _QUERY.sub(rf"\1{MARK}", _USER.sub(MARK, line))


def redact_setting(pair: str) -> str:
    """An override ``path=value`` as it may be shown and recorded.

    >>> redact_setting("train.token=5bd91e77a0"), redact_setting("batch=64")
    ('train.token=<redacted>', 'batch=64')
    """
    path, equals, value = pair.partition("=")
    names = [name for name in path.split(".") if not name.isdigit()]
    if not equals or not names or not is_secret(names[-1]) or value.lower() in ("", "none", "null"):
        return redact_urls(pair)
    register_secrets(value.strip("'\""))
    return f"{path}={MARK}"


def redact(line: str) -> str:
    """``line`` without any secret that is known or that looks like one."""
    for value in sorted(_known, key=len, reverse=True):
        line = line.replace(value, MARK)
    return _BEARER.sub(rf"\1{MARK}", _QUOTED.sub(rf"\1\2{MARK}\2", redact_urls(line)))


@contextlib.contextmanager
def redact_output() -> Iterator[None]:
    """In this block what goes to ``sys.stdout`` and ``sys.stderr`` goes through ``redact``."""
    for name, value in os.environ.items():
        if is_secret(name) and not os.path.exists(value):  # noqa: PTH110 - Path minds long ones
            register_secrets(value, _SHORTEST_IN_ENVIRONMENT)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _RedactedStream(sys.stdout), _RedactedStream(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _RedactedStream:
    """A stream that writes everything through ``redact``."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, line: str) -> int:
        with _WRITING:
            self._stream.write(redact(line))
        return len(line)

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@functools.lru_cache(maxsize=256)
def _digest(name: str, values: tuple[str, ...]) -> str:
    """Slow on purpose, about 30 ms: guessing is for whoever has much time."""
    value = repr(values).encode()
    return hashlib.pbkdf2_hmac("sha256", value, b"jaxtrain " + name.encode(), 100_000, dklen=4).hex()
