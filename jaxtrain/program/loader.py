"""From a source to device batches: ``batch(step)`` for any step, and a pure ``fetch`` inside the step.

Small sets are resident: their arrays are replicated on the devices, the host sends row numbers, and the
gather is compiled into the step. Large sets are streamed by Grain, whose element k is batch k. The loop sees
no difference: it passes ``batch(step)`` to a step that starts with ``fetch``. Each process gathers and sends
only the rows of its own devices.
"""

from __future__ import annotations

import copy
import dataclasses
import signal
import sys
from collections.abc import Callable
from typing import Any, Protocol, Self

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtrain import sharding
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.text import first_line
from jaxtrain.core.types import Batch
from jaxtrain.core.user_modules import UserModule
from jaxtrain.data.order import Order, Sequential
from jaxtrain.data.paths import BaseFolders
from jaxtrain.data.sources import Arrays, Source
from jaxtrain.sharding import multihost

EXAMPLE_ID, EPOCH = "example_id", "epoch"

Check = Callable[[Batch, np.ndarray], None]
"""``(raw batch, example ids) -> None``; raises InputError for data that must not reach the device."""

_IGNORE_LEAKED_BUFFERS = "ignore:resource_tracker:UserWarning"


class Loader(Protocol):
    """Batches by step."""

    shardings: Any
    """Shardings of ``batch(step)``, as a pytree prefix."""

    stacked_shardings: tuple[Any, Any]
    """Shardings of ``batches(step, count)``, as a pytree prefix."""

    def batch(self, step: int) -> Any:
        """Return the ``batch`` argument of the compiled step for batch ``step``, counted from 0."""

    def batches(self, step: int, count: int) -> tuple[Any, Any]:
        """Return batches ``step`` to ``step + count``: fields that differ, stacked, and those that all share.

        The two dicts together have the fields of ``batch`` (``step.scan_steps``).
        """

    def abstract_batch(self) -> Any:
        """Return a batch, or its shapes and shardings, to trace and compile with."""

    def fetch(self, batch: Any) -> Batch:
        """Return the named arrays of ``batch``; pure, for use inside the step."""

    def with_order(self, order: Order) -> Self:
        """Return a loader of the same source whose batches are those of ``order``."""

    def host_batch(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return ``batch(step)`` of one process as two dicts: fields on the host, and arrays of all steps."""

    def close(self) -> None:
        """Stop threads and worker processes; another ``batch`` starts them again."""


class Resident:
    """Batches of a source that is replicated on the devices; the host sends row numbers only.

    The arrays are an argument of the step. Closing over them would make them constants of the program,
    which costs seconds of compile time and hides them from the memory analysis.
    """

    def __init__(self, arrays: Arrays, order: Order | Sequential, mesh: Mesh) -> None:
        self._order, self._global = order, multihost.makes_global_arrays(mesh)
        self._data = multihost.put_replicated(dict(arrays.fields), sharding.replicated(mesh))
        split = sharding.batch_split(mesh)
        self._rows = multihost.local_rows(split, order.batch)
        self.shardings = {"data": sharding.replicated(mesh), "rows": split}
        if isinstance(order, Sequential):
            self.shardings["mask"] = split
        self.stacked_shardings = {"rows": sharding.stacked(split)}, {"data": self.shardings["data"]}

    def batch(self, step: int) -> Any:
        if isinstance(self._order, Order):
            sent = {"rows": _ids_and_epochs(self._order, step)}
        else:
            rows, mask = self._order.rows(step)
            sent = {"rows": rows.astype(np.int32), "mask": mask}
        if self._global:  # one process leaves the copy of NumPy arrays to the call
            sent = {name: array[self._rows] for name, array in sent.items()}
            sent = multihost.put_local_rows(sent, self.shardings["rows"], self._order.batch)
        return {"data": self._data, **sent}

    def batches(self, step: int, count: int) -> tuple[Any, Any]:
        assert isinstance(self._order, Order)  # only training stacks batches
        rows = np.stack([_ids_and_epochs(self._order, step + k) for k in range(count)])
        if self._global:
            rows = multihost.put_local_rows(
                rows[:, self._rows], self.stacked_shardings[0]["rows"], self._order.batch, axis=1
            )
        return {"rows": rows}, {"data": self._data}

    def with_order(self, order: Order) -> Self:
        other = copy.copy(self)
        other._order = order
        return other

    def host_batch(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        assert isinstance(self._order, Order)  # only training asks for it
        return {"rows": _ids_and_epochs(self._order, step)}, {"data": self._data}

    def abstract_batch(self) -> Any:
        return self.batch(0)

    def fetch(self, batch: Any) -> Batch:
        rows = batch["rows"]
        if "mask" in batch:
            fields = {name: array[rows] for name, array in batch["data"].items()}
            return {**fields, "mask": batch["mask"], EXAMPLE_ID: rows}
        ids, epochs = rows[:, 0], rows[:, 1]
        fields = {name: array[ids] for name, array in batch["data"].items()}
        return {**fields, EXAMPLE_ID: ids, EPOCH: epochs}

    def close(self) -> None:
        pass


def _ids_and_epochs(order: Order, step: int) -> np.ndarray:
    """Return both in one array, int32 ``[batch, (example id, epoch)]``: the host sends one array a step."""
    rows = np.empty((order.batch, 2), np.int32)
    rows[:, 0], rows[:, 1] = order.ids_and_epochs(step)
    return rows


class Streamed:
    """Batches that Grain gathers on the host while the device computes.

    Consecutive steps read one stream; any other step starts a new stream there.

    ``batch`` only starts the copy to the device, and the loop asks for batches k + 1 and k + 2 before it
    waits for step k (``max_in_flight`` of 2): each batch is copied while the previous one is computed, and
    Grain gathers four more meanwhile. Starting each copy one step sooner, in a thread or right after a
    dispatch, gained nothing (docs/decisions/streamed-copies.md).

    Args:
      source: where the examples come from.
      order: which examples make up batch k.
      mesh: the devices.
      workers: Grain processes that gather; 0 gathers in threads of this process.
      check: checks every raw batch on the host. Its InputError becomes a RunError after the first batch,
        when training has started.
      first: checks the first batch only, whichever step that is.
    """

    def __init__(
        self,
        source: Source,
        order: Order | Sequential,
        mesh: Mesh,
        workers: int = 0,
        check: Check | None = None,
        first: Check | None = None,
    ) -> None:
        self.shardings = sharding.batch_split(mesh)
        self.stacked_shardings: tuple[Any, Any] = sharding.stacked(self.shardings), {}
        self._batches = _Batches(source, order, multihost.local_rows(self.shardings, order.batch))
        self._workers, self._check, self._first = workers, check, first
        self._started = False
        self._stream: Any = None  # a Grain iterator
        self._next = -1
        self._abstract: Any = None

    def batch(self, step: int) -> Any:
        batch = multihost.put_local_rows(self._next_batch(step), self.shardings, self._batches.order.batch)
        if self._abstract is None:
            self._abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch
            )
        return batch

    def batch_here(self, step: int) -> Any:
        """``batch(step)``, gathered in this process and not checked: no stream and no workers are started."""
        return multihost.put_local_rows(self._batches[step], self.shardings, self._batches.order.batch)

    def batches(self, step: int, count: int) -> tuple[Any, Any]:
        batches = [self._next_batch(step + k) for k in range(count)]
        fields = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
        split = self.stacked_shardings[0]
        return multihost.put_local_rows(fields, split, self._batches.order.batch, axis=1), {}

    def with_order(self, order: Order) -> Self:
        other = copy.copy(self)
        other._batches = dataclasses.replace(self._batches, order=order)
        other._stream, other._next, other._started = None, -1, False
        return other

    def host_batch(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return self._next_batch(step), {}

    def abstract_batch(self) -> Any:
        if self._abstract is None:
            self.batch(0)
        return self._abstract

    def _next_batch(self, step: int) -> dict[str, np.ndarray]:
        """Return batch ``step`` from the stream, checked."""
        if self._stream is None or step != self._next:
            self.close()
            self._stream = self._open(step)
        self._next = step + 1
        batch = self._gather(step)
        self._check_batch(batch, batch[EXAMPLE_ID])
        return batch

    def _gather(self, step: int) -> dict[str, np.ndarray]:
        try:
            batch: dict[str, np.ndarray] = next(self._stream)
            return batch
        except InputError as error:
            if self._started:
                raise RunError(f"{error}; earlier checkpoints are kept") from error
            raise
        except RunError:
            raise
        except Exception as error:  # a user's own source, or a disk that is gone: anything may come out
            source = self._batches.source
            name = getattr(source, "class_name", type(source).__name__)
            if "Worker process was terminated" in str(error):  # Grain's words
                raise RunError(
                    f"a worker process that reads {name} ended, see its output above; checkpoints are "
                    "kept: run again, or read in this process with workers=0"
                ) from error
            raise RunError(
                f"{name}.gather failed at batch {step + 1}: "
                f"{type(error).__name__}: {first_line(error)}; earlier checkpoints are kept: fix the "
                "data, then run the same command again (--debug shows where)"
            ) from error

    def _check_batch(self, batch: Batch, ids: np.ndarray) -> None:
        if self._first is not None and not self._started:
            self._first(batch, ids)
        try:
            if self._check is not None:
                self._check(batch, ids)
        except InputError as error:
            if self._started:
                raise RunError(f"{error}; earlier checkpoints are kept") from error
            raise
        self._started = True

    def fetch(self, batch: Any) -> Batch:
        return batch

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _open(self, step: int) -> Any:
        import grain  # here: the import takes a second, and resident runs never need it

        data = grain.MapDataset.source(self._batches).slice(slice(step, None))
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        if not self._workers:
            return iter(data.to_iter_dataset(options))
        _parse_absl_flags()
        # A run that ends early leaves batches in shared memory. Python's tracker frees them with a warning.
        if _IGNORE_LEAKED_BUFFERS not in sys.warnoptions:
            sys.warnoptions.append(_IGNORE_LEAKED_BUFFERS)
        processes = grain.MultiprocessingOptions(num_workers=self._workers)
        return iter(data.to_iter_dataset(options).mp_prefetch(processes, worker_init_fn=_ignore_interrupts))


@dataclasses.dataclass(frozen=True)
class _Batches:
    """A Grain data source: element k is rows ``rows`` of batch k. Pickles with the module of its source."""

    source: Source
    order: Order | Sequential
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.order) if isinstance(self.order, Sequential) else 2**62

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        if isinstance(self.order, Sequential):
            ids, mask = (array[self.rows] for array in self.order.rows(step))
            return {**self.source.gather(ids), "mask": mask, EXAMPLE_ID: ids.astype(np.int32)}
        ids, epochs = (array[self.rows] for array in self.order.ids_and_epochs(step))
        draw = getattr(self.source, "draw", None)
        fields = self.source.gather(ids) if draw is None else draw(ids, epochs, self.order.seed)
        return {**fields, EXAMPLE_ID: ids.astype(np.int32), EPOCH: epochs.astype(np.int32)}

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (UserModule(), BaseFolders(), self.source, self.order, self.rows)


def _unpickle(
    _: UserModule, __: BaseFolders, source: Source, order: Order | Sequential, rows: np.ndarray
) -> _Batches:
    return _Batches(source, order, rows)


def _ignore_interrupts(worker: int, workers: int) -> None:
    """Leave Ctrl-C, which the terminal sends to every process, to the one that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _parse_absl_flags() -> None:
    """Mark absl flags as parsed: Grain's workers read them, and only an absl program parses them."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
