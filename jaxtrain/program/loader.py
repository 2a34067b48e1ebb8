"""From a source to device batches: ``batch(step)`` for any step, and a pure ``fetch`` inside the step.

Small sets are resident: their arrays live whole on each device, the host sends row numbers, and the gather
is compiled into the step. Large sets are streamed by Grain, whose element k is batch k. The loop sees no
difference: it hands ``batch(step)`` to a step that starts with ``fetch``. A process gathers and sends only
the rows of a batch that its own devices hold.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtrain import sharding
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.text import first_line
from jaxtrain.core.types import Batch
from jaxtrain.core.user_modules import UserModule
from jaxtrain.data.order import Order, Sequential
from jaxtrain.data.sources import Arrays, Source
from jaxtrain.sharding import multihost

EXAMPLE_ID, EPOCH = "example_id", "epoch"

Check = Callable[[Batch, np.ndarray], None]
"""``(raw batch, example ids) -> None``; raises InputError for data that must not reach the device."""

_LEFT_OVER = "ignore:resource_tracker:UserWarning"


class Loader(Protocol):
    """Batches by step."""

    shardings: Any
    """Shardings of ``batch(step)``, as a pytree prefix."""

    many: tuple[Any, Any]
    """Shardings of ``batches(step, count)``, as a pytree prefix."""

    def batch(self, step: int) -> Any:
        """What the step's ``batch`` argument takes, for batch ``step``."""

    def batches(self, step: int, count: int) -> tuple[Any, Any]:
        """Batches ``step`` to ``step + count``: what differs, stacked, and what is the same in all of them.

        Either part, or both together, are a dict as ``batch`` gives it (``step.scan_steps``).
        """

    def abstract_batch(self) -> Any:
        """What stands for ``batch(step)`` in tracing and compiling ahead: shapes, or a batch."""

    def fetch(self, batch: Any) -> Batch:
        """Pure, inside the step: the named arrays of that batch."""

    def close(self) -> None:
        """Let go of threads and worker processes; another ``batch`` starts them again."""


class Resident:
    """The whole source on every device; only row numbers travel.

    The arrays are an argument of the step. Closing over them would make them constants of the program,
    which costs seconds of compile time and hides them from the memory analysis.
    """

    def __init__(self, arrays: Arrays, order: Order | Sequential, mesh: Mesh) -> None:
        self._order = order
        self._data = multihost.put_replicated(dict(arrays.fields), sharding.replicated(mesh))
        split = sharding.batch_split(mesh)
        self._rows = multihost.local_rows(split, order.batch)
        self.shardings = {"data": sharding.replicated(mesh), "rows": split}
        if isinstance(order, Sequential):
            self.shardings["mask"] = split
        self.many = {"rows": sharding.stacked(split)}, {"data": self.shardings["data"]}

    def batch(self, step: int) -> Any:
        if isinstance(self._order, Order):
            sent = {"rows": self._places(self._order, step)}
        else:
            rows, mask = self._order.rows(step)
            sent = {"rows": rows.astype(np.int32), "mask": mask}
        if multihost.process_count() > 1:  # one process may leave it to the step to send its NumPy arrays
            sent = {name: array[self._rows] for name, array in sent.items()}
            sent = multihost.put_local_rows(sent, self.shardings["rows"], self._order.batch)
        return {"data": self._data, **sent}

    def batches(self, step: int, count: int) -> tuple[Any, Any]:
        assert isinstance(self._order, Order)  # evaluation goes batch by batch
        rows = np.stack([self._places(self._order, step + k) for k in range(count)])
        if multihost.process_count() > 1:
            rows = multihost.put_local_rows(
                rows[:, self._rows], self.many[0]["rows"], self._order.batch, axis=1
            )
        return {"rows": rows}, {"data": self._data}

    def abstract_batch(self) -> Any:
        return self.batch(0)

    def _places(self, order: Order, step: int) -> np.ndarray:
        """One array, so that the host sends one thing a step: int32 [batch, (example id, epoch)]."""
        placed = np.empty((order.batch, 2), np.int32)
        placed[:, 0], placed[:, 1] = order.ids_and_epochs(step)
        return placed

    def fetch(self, batch: Any) -> Batch:
        rows = batch["rows"]
        if "mask" in batch:
            return {**{name: array[rows] for name, array in batch["data"].items()}, "mask": batch["mask"]}
        ids, epochs = rows[:, 0], rows[:, 1]
        fields = {name: array[ids] for name, array in batch["data"].items()}
        return {**fields, EXAMPLE_ID: ids, EPOCH: epochs}

    def close(self) -> None:
        pass


class Streamed:
    """Batches gathered on the host while earlier ones are computed.

    Asking for steps in order streams them; asking for any other step starts a new stream there.

    ``batch`` only starts the copy to the device, and the loop asks for batch k + 1 and k + 2 before it waits
    for step k (``max_in_flight`` of 2): so a batch is copied while the one before it is computed, and Grain
    gathers four more meanwhile. Putting each batch one step sooner, in a thread or right after a dispatch,
    won nothing (docs/decisions/streamed-copies.md).

    Args:
      source: where the examples come from.
      order: which examples make up batch k.
      mesh: the devices.
      workers: Grain processes that gather; 0 gathers in threads of this process.
      check: looks at every raw batch on the host; what it finds after the first batch is a RunError, because
        the run is on its way.
      first: looks at the first batch only, whichever step that is.
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
        self.many: tuple[Any, Any] = sharding.stacked(self.shardings), {}
        self._batches = _Batches(source, order, multihost.local_rows(self.shardings, order.batch))
        self._workers, self._check, self._first = workers, check, first
        self._begun = False
        self._stream: Any = None  # a Grain iterator
        self._next = -1
        self._like: Any = None

    def batch(self, step: int) -> Any:
        batch = multihost.put_local_rows(self._taken(step), self.shardings, self._batches.order.batch)
        if self._like is None:
            self._like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch
            )
        return batch

    def batches(self, step: int, count: int) -> tuple[Any, Any]:
        taken = [self._taken(step + k) for k in range(count)]
        fields = {name: np.stack([batch[name] for batch in taken]) for name in taken[0]}
        return multihost.put_local_rows(fields, self.many[0], self._batches.order.batch, axis=1), {}

    def abstract_batch(self) -> Any:
        if self._like is None:
            self.batch(0)
        return self._like

    def _taken(self, step: int) -> dict[str, np.ndarray]:
        """Batch ``step`` out of the stream, looked at."""
        if self._stream is None or step != self._next:
            self.close()
            self._stream = self._open(step)
        self._next = step + 1
        batch = self._gathered(step)
        ids = batch.pop(EXAMPLE_ID) if "mask" in batch else batch[EXAMPLE_ID]
        self._look(batch, ids)
        return batch

    def _gathered(self, step: int) -> dict[str, np.ndarray]:
        try:
            batch: dict[str, np.ndarray] = next(self._stream)
            return batch
        except (InputError, RunError):
            raise
        except Exception as error:  # a user's own source, or a disk that is gone: anything may come out
            raise RunError(
                f"{type(self._batches.source).__name__}.gather failed at batch {step + 1}: "
                f"{type(error).__name__}: {first_line(error)}; earlier checkpoints are kept: mend the "
                "data, then run the same command again (--debug shows where)"
            ) from error

    def _look(self, batch: Batch, ids: np.ndarray) -> None:
        if self._first is not None and not self._begun:
            self._first(batch, ids)
        try:
            if self._check is not None:
                self._check(batch, ids)
        except InputError as error:
            if self._begun:
                raise RunError(f"{error}; earlier checkpoints are kept") from error
            raise
        self._begun = True

    def fetch(self, batch: Any) -> Batch:
        return batch

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _open(self, step: int) -> Any:
        import grain  # here: it takes a second to import, and resident runs never need it

        data = grain.MapDataset.source(self._batches).slice(slice(step, None))
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        if not self._workers:
            return iter(data.to_iter_dataset(options))
        _parse_absl_flags()
        # A run that ends early leaves batches that nobody takes. Python's tracker frees them, and says so.
        if _LEFT_OVER not in sys.warnoptions:
            sys.warnoptions.append(_LEFT_OVER)
        processes = grain.MultiprocessingOptions(num_workers=self._workers)
        return iter(data.to_iter_dataset(options).mp_prefetch(processes, worker_init_fn=_ignore_interrupts))


@dataclasses.dataclass(frozen=True)
class _Batches:
    """Rows ``rows`` of batch k as element k, for Grain. Pickled with the user's files of its source."""

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
        return _restored, (UserModule(), self.source, self.order, self.rows)


def _restored(_: UserModule, source: Source, order: Order | Sequential, rows: np.ndarray) -> _Batches:
    return _Batches(source, order, rows)


def _ignore_interrupts(worker: int, workers: int) -> None:
    """Ctrl-C goes to every process of the terminal; the one that trains decides what happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _parse_absl_flags() -> None:
    """Grain's workers read absl flags, which nobody has parsed outside an absl program."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
