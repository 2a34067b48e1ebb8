"""Several processes that run one program: how they start, agree, and hand their rows to their devices.

Each process runs the same program in the same order: every process calls ``broadcast_from_0``,
``on_process_0``, ``barrier`` and ``Votes.any_process``, or none does. With one process they cost nothing
and use no network.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.text import first_line
from jaxtrain.sharding.initialize import start

__all__ = [
    "Votes",
    "barrier",
    "broadcast_from_0",
    "exit_process",
    "is_process_0",
    "local_rows",
    "lost_process_error",
    "on_process_0",
    "process_count",
    "process_index",
    "put_local_rows",
    "put_replicated",
    "start",
]

T = TypeVar("T")

BLOCK = 4096  # bytes that one broadcast carries; one program is compiled for it
LAST_WORDS_SECONDS = 1.0  # seconds that the first process outlives an error, for the others to tell theirs
VOTE_DELAY = 2  # calls until a vote is read


def process_index() -> int:
    """Which process this is, from 0."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def process_count() -> int:
    """How many processes run this program; starts no backend where there is one.

    >>> process_count()
    1
    """
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_process_0() -> bool:
    """Is this process 0, which writes and prints for all?"""
    return process_index() == 0


def broadcast_from_0(value: T, what: str) -> T:
    """``value`` of process 0, in every process; with one process ``value`` itself.

    Args:
      value: what JSON can hold; only that of process 0 counts.
      what: its name, the same in every process.

    Raises:
      RunError: the processes are not at the same place, or one has ended.

    >>> broadcast_from_0({"step": 3}, "step")
    {'step': 3}
    """
    return on_process_0(lambda: value, what)


def on_process_0(work: Callable[[], T], what: str | None = None) -> T:
    """The result of ``work()``, which only process 0 does; an error there is raised in every process.

    Args:
      work: returns what JSON can hold. With several processes its tuples come back as lists.
      what: its name, the same in every process; None is the line of the caller.

    Raises:
      InputError, RunError: as ``work`` raises them, with its text; RunError in the other processes for
        anything else that it raises, and where the processes are not at the same place.
    """
    if process_count() == 1:
        return work()
    if what is None:
        caller = sys._getframe(1)
        what = f"{caller.f_globals.get('__name__')}:{caller.f_lineno}"
    failure: Exception | None = None
    text = b""
    if is_process_0():
        try:
            text = json.dumps({"what": what, "value": work()}).encode()
        except Exception as error:  # the others wait for an answer, whatever it is
            failure = error
            text = json.dumps({"what": what, **_error_as_json(error)}).encode()
    answer = json.loads(_broadcast(text))
    if failure is not None:
        raise failure
    if answer["what"] != what:
        raise RunError(
            f"process {process_index()} is at {what!r} and process 0 at {answer['what']!r}: the processes "
            "do not run the same program"
        )
    if "error" in answer:
        raise (InputError if answer["input"] else RunError)(answer["error"])
    value: T = answer["value"]
    return value


def barrier(name: str) -> None:
    """Return when every process is here. Raises RunError as ``broadcast_from_0``."""
    broadcast_from_0(name, f"barrier {name}")


class Votes:
    """What any process wants all to do, such as to stop, agreed without waiting for the devices.

    >>> Votes().any_process(15)
    15
    """

    def __init__(self) -> None:
        self._ballots: dict[int, jax.Array] = {}
        self._queue: collections.deque[jax.Array] = collections.deque()

    def any_process(self, flag: int) -> int:
        """Give this process's flag; returns the highest that was given two calls ago, 0 before that.

        All processes get the same answer from the same call. One process gets its flag at once.

        Args:
          flag: an int32 of 0 or more, such as a signal's number.

        Raises:
          RunError: another process has ended.
        """
        if process_count() == 1:
            return flag
        split, highest = _all_devices_max()
        with _translate_lost_process():
            if flag not in self._ballots:
                self._ballots[flag] = _own_row(np.full((1,), flag, np.int32), split)
            self._queue.append(highest(self._ballots[flag]))
            if len(self._queue) <= VOTE_DELAY:
                return 0
            return int(np.asarray(self._queue.popleft()))


@functools.lru_cache(maxsize=64)
def local_rows(sharding: NamedSharding, n: int, axis: int = 0) -> np.ndarray:
    """Which rows of ``n`` this process's devices hold: int64 [rows], sorted, each once.

    Args:
      sharding: of an array with ``n`` rows; only how it splits them counts.
      n: rows of the whole array, which must divide over the split.
      axis: which axis of the array the rows are.
    """
    leading = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[axis : axis + 1]))
    slices = leading.addressable_devices_indices_map((n,)).values()
    rows = np.unique(np.concatenate([np.arange(n)[index] for index in slices if index is not None]))
    rows.flags.writeable = False  # it is handed out again
    return rows


def put_local_rows(tree: Any, shardings: Any, n: int, axis: int = 0) -> Any:
    """Make global arrays [n, ...] from this process's rows of them.

    Args:
      tree: arrays [local, ...] on the host, whose rows are those of ``local_rows``.
      shardings: NamedShardings, as a pytree prefix of ``tree``.
      n: rows of the global arrays.
      axis: which axis the rows are; those before it are not split.

    Raises:
      ValueError: an array with another number of rows.
    """
    shapes = jax.tree.map(lambda x: (*x.shape[:axis], n, *x.shape[axis + 1 :]), tree)
    return jax.make_array_from_process_local_data(shardings, tree, shapes)


def put_replicated(tree: Any, sharding: NamedSharding) -> Any:
    """Make global arrays of ``tree``, which every process has with the same values.

    Unlike ``jax.device_put``, which compares the values of all processes, this does not communicate.

    Args:
      tree: arrays, random keys among them.
      sharding: where they go, usually ``replicated``.
    """
    return jax.make_array_from_process_local_data(sharding, tree, jax.tree.map(jnp.shape, tree))


def lost_process_error(error: BaseException) -> RunError | None:
    """What to say of an error of JAX that comes from another process having ended; None for any other."""
    text = str(error)  # raw text of Gloo or NCCL: it says how it was noticed, and not what has happened
    of_others = any(word in text for word in ("Gloo", "NCCL", "coordination service", "CoordinationService"))
    if process_count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError) or not of_others:
        return None
    return RunError(
        f"process {process_index()}: another process of this run has ended or cannot be reached: see its "
        "own message"
    )


def exit_process(code: int) -> NoReturn:
    """End this process with ``code``; one of several ends at once if it failed.

    At the end of a process JAX waits minutes for the others to end too, and they may be waiting for this one.
    The first waits a moment: without it JAX aborts the others, who have their own line to say.
    """
    if code and process_count() > 1:
        time.sleep(LAST_WORDS_SECONDS if is_process_0() else 0)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _error_as_json(error: Exception) -> dict[str, Any]:
    """An error of process 0, for the others."""
    if isinstance(error, InputError | RunError):
        return {"error": str(error), "input": isinstance(error, InputError)}
    return {"error": f"process 0: {type(error).__name__}: {first_line(error)}", "input": False}


@contextlib.contextmanager
def _translate_lost_process() -> Iterator[None]:
    """Errors of JAX that come from another process having ended, as RunError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        told = lost_process_error(error)
        if told is None:
            raise
        raise told from error


def _broadcast(data: bytes) -> bytes:
    """``data`` of process 0, in every process; what the others give must be empty."""
    with _translate_lost_process():
        head = _all_max((len(data).to_bytes(8, "big") + data[: BLOCK - 8]).ljust(BLOCK, b"\0"))
        size, rest = int.from_bytes(head[:8], "big"), b""
        if size > BLOCK - 8:  # in powers of two, so that few lengths are compiled
            padded = 1 << (size - BLOCK + 8 - 1).bit_length()
            rest = _all_max(data[BLOCK - 8 :].ljust(padded, b"\0"))
    return (head[8:] + rest)[:size]


def _all_max(row: bytes) -> bytes:
    """The bytewise highest of all processes' rows, which have one length."""
    split, highest = _all_devices_max()
    own = _own_row(np.frombuffer(row, np.uint8)[None], split)
    return np.asarray(highest(own)).tobytes()


def _own_row(row: np.ndarray, split: NamedSharding) -> jax.Array:
    """An array [devices, ...] that holds ``row`` for each device of this process."""
    shape = (jax.device_count(), *row.shape[1:])
    return jax.make_array_from_callback(shape, split, lambda index: row)


@functools.cache
def _all_devices_max() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """A row for each device of every process, and the highest over these rows, on all of them.

    ``multihost_utils`` has such functions, for the same number of devices in each process.
    """
    mesh = Mesh(np.array(jax.devices()), ("all",))
    split, whole = NamedSharding(mesh, PartitionSpec("all")), NamedSharding(mesh, PartitionSpec())
    return split, jax.jit(lambda x: x.max(axis=0), out_shardings=whole)
