"""Several processes that run one program: start, agreement between them, and arrays from local rows.

All processes run the same program in the same order: every process calls ``broadcast_from_0``,
``on_process_0``, ``barrier`` and ``StopVotes.any_process``, or none does. With one process
these cost nothing and use no network.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.text import first_line
from jaxtrain.sharding import described
from jaxtrain.sharding.initialize import start

__all__ = [
    "StopVotes",
    "barrier",
    "broadcast_from_0",
    "exit_process",
    "is_process_0",
    "leave",
    "local_rows",
    "lost_process_error",
    "makes_global_arrays",
    "on_process_0",
    "process_count",
    "process_index",
    "put_local_rows",
    "put_replicated",
    "start",
]

T = TypeVar("T")

BLOCK = 4096  # bytes of one broadcast, for which one program is compiled
EXIT_DELAY = 1.0  # seconds that process 0 waits after an error, for the others to print theirs
LEAVE_TIMEOUT = 30.0  # seconds that a process which stops waits for the others
VOTE_DELAY = 2  # calls until a vote is read


def process_index() -> int:
    """Return the number of this process, from 0."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def process_count() -> int:
    """Return the number of processes; with a single one this does not start a backend.

    >>> process_count()
    1
    """
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_process_0() -> bool:
    """Return whether this is process 0, which writes files and prints."""
    return process_index() == 0


def broadcast_from_0(value: T, what: str) -> T:
    """Return the ``value`` of process 0 in every process; with one process, ``value`` itself.

    Args:
      value: JSON; ignored in the other processes.
      what: its name, the same in every process.

    Raises:
      RunError: the processes are at different calls, or one has ended.

    >>> broadcast_from_0({"step": 3}, "step")
    {'step': 3}
    """
    return on_process_0(lambda: value, what)


def on_process_0(work: Callable[[], T], what: str | None = None) -> T:
    """Run ``work()`` on process 0 only and return its result, or raise its error, in every process.

    Args:
      work: returns JSON. With several processes, tuples in it become lists.
      what: its name, the same in every process; None uses the module and line of the caller.

    Raises:
      InputError, RunError: as ``work`` raises them. In the other processes, RunError for any other error,
        and where the processes are at different calls.
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
        except Exception as error:  # any: the other processes wait for an answer
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
    """Wait for all processes. Raises RunError as ``broadcast_from_0``."""
    broadcast_from_0(name, f"barrier {name}")


class StopVotes:
    """Agree on a flag that any process raises, such as to stop, without waiting for the devices.

    >>> StopVotes().any_process(15)
    15
    """

    def __init__(self) -> None:
        self._ballots: dict[int, jax.Array] = {}
        self._queue: collections.deque[jax.Array] = collections.deque()

    def any_process(self, flag: int) -> int:
        """Submit this process's flag; returns the highest flag of two calls ago, and 0 before that.

        All processes get the same result from the same call. A single process gets its flag back.

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
    """Return the rows, of ``n``, that this process's devices have: int64 [rows], sorted, each once.

    Args:
      sharding: of an array with ``n`` rows; only its split of the rows matters.
      n: rows of the global array, which must divide over the split.
      axis: the axis of the rows.
    """
    leading = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[axis : axis + 1]))
    slices = leading.addressable_devices_indices_map((n,)).values()
    rows = np.unique(np.concatenate([np.arange(n)[index] for index in slices if index is not None]))
    rows.flags.writeable = False  # the cache returns it again
    return rows


def makes_global_arrays(mesh: Mesh) -> bool:
    """Return whether batches must be made by ``put_local_rows``, not sent as NumPy arrays by the call."""
    return process_count() > 1 or described.card_of(mesh) is not None


def put_local_rows(tree: Any, shardings: Any, n: int, axis: int = 0) -> Any:
    """Make global arrays [n, ...] from this process's rows of them; only their shapes for described devices.

    Args:
      tree: arrays [local, ...] on the host, whose rows are those of ``local_rows``.
      shardings: NamedShardings, as a pytree prefix of ``tree``.
      n: rows of the global arrays.
      axis: the axis of the rows; those before it are not split.

    Raises:
      ValueError: an array with another number of rows.
    """
    shapes = jax.tree.map(lambda x: (*x.shape[:axis], n, *x.shape[axis + 1 :]), tree)
    if described.card_of(jax.tree.leaves(shardings)[0].mesh) is not None:
        return _abstract(tree, shardings, shapes)
    return jax.make_array_from_process_local_data(shardings, tree, shapes)


def put_replicated(tree: Any, sharding: NamedSharding) -> Any:
    """Make global arrays of ``tree``, which every process has with the same values.

    For described devices (``sharding.described``) these are shapes only.

    Unlike ``jax.device_put``, which compares the values of all processes, this does not communicate.

    Args:
      tree: arrays, random keys among them.
      sharding: where they go, usually ``replicated``.
    """
    if described.card_of(sharding.mesh) is not None:
        return _abstract(tree, sharding, jax.tree.map(jnp.shape, tree))
    return jax.make_array_from_process_local_data(sharding, tree, jax.tree.map(jnp.shape, tree))


def _abstract(tree: Any, shardings: Any, shapes: Any) -> Any:
    """Return ``tree`` as shapes with dtypes and shardings (a pytree prefix)."""
    dtypes = jax.eval_shape(lambda tree: tree, tree)
    return jax.tree.map(
        lambda x, where, shape: jax.ShapeDtypeStruct(shape, x.dtype, sharding=where),
        dtypes,
        jax.tree.broadcast(shardings, dtypes),
        shapes,
    )


def lost_process_error(error: BaseException) -> RunError | None:
    """Translate an error of JAX after another process has ended; None for any other error."""
    text = str(error)  # by Gloo or NCCL: it says how the loss was noticed, not what has happened
    lost = any(word in text for word in ("Gloo", "NCCL", "coordination service", "CoordinationService"))
    if process_count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError) or not lost:
        return None
    return RunError(
        f"process {process_index()}: another process of this run has ended or cannot be reached: see its "
        "own message"
    )


def leave(timeout: float = LEAVE_TIMEOUT) -> None:
    """Leave the group of processes: returns when all have called this, or after ``timeout`` seconds.

    ``barrier`` is a collective: a process can have its result, and exit, while another still receives it and
    then fails. This waits by JAX's coordination service. Nothing of this module may be called afterwards.
    """
    if process_count() == 1:
        return

    def shut_down() -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError, RuntimeError):  # another process has ended
            jax.distributed.shutdown()

    waiting = threading.Thread(target=shut_down, daemon=True)
    waiting.start()
    waiting.join(timeout)


def exit_process(code: int) -> NoReturn:
    """Exit with ``code``; one of several processes exits immediately after a failure.

    When a process exits, JAX waits minutes for the others, and they may be waiting for this one. Process 0
    waits a moment: when it is gone JAX aborts the others, which must print their own message first.
    """
    if code and process_count() > 1:
        time.sleep(EXIT_DELAY if is_process_0() else 0)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _error_as_json(error: Exception) -> dict[str, Any]:
    """Return an error of process 0 as JSON for the others."""
    if isinstance(error, InputError | RunError):
        return {"error": str(error), "input": isinstance(error, InputError)}
    return {"error": f"process 0: {type(error).__name__}: {first_line(error)}", "input": False}


@contextlib.contextmanager
def _translate_lost_process() -> Iterator[None]:
    """Turn errors of JAX after another process has ended into RunError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        lost = lost_process_error(error)
        if lost is None:
            raise
        raise lost from error


def _broadcast(data: bytes) -> bytes:
    """Return the ``data`` of process 0 in every process; that of the others must be empty."""
    with _translate_lost_process():
        head = _bytewise_max((len(data).to_bytes(8, "big") + data[: BLOCK - 8]).ljust(BLOCK, b"\0"))
        size, rest = int.from_bytes(head[:8], "big"), b""
        if size > BLOCK - 8:  # in powers of two, so that few programs are compiled
            padded = 1 << (size - BLOCK + 8 - 1).bit_length()
            rest = _bytewise_max(data[BLOCK - 8 :].ljust(padded, b"\0"))
    return (head[8:] + rest)[:size]


def _bytewise_max(row: bytes) -> bytes:
    """Return the bytewise maximum of all processes' rows, which have the same length."""
    split, highest = _all_devices_max()
    own = _own_row(np.frombuffer(row, np.uint8)[None], split)
    return np.asarray(highest(own)).tobytes()


def _own_row(row: np.ndarray, split: NamedSharding) -> jax.Array:
    """Return an array [devices, ...] with ``row`` for each device of this process."""
    shape = (jax.device_count(), *row.shape[1:])
    return jax.make_array_from_callback(shape, split, lambda index: row)


@functools.cache
def _all_devices_max() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """Return the sharding of one row per device of every process, and a function for the maximum of the rows.

    The functions of ``multihost_utils`` need the same number of devices in each process.
    """
    mesh = Mesh(np.array(jax.devices()), ("all",))
    split, replicated = NamedSharding(mesh, PartitionSpec("all")), NamedSharding(mesh, PartitionSpec())
    return split, jax.jit(lambda x: x.max(axis=0), out_shardings=replicated)
