"""The files of a run's records: ``metrics.jsonl`` and TensorBoard's events."""

from __future__ import annotations

import contextlib
import functools
import json
import platform
import re
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from jaxtrain.core.errors import RunError
from jaxtrain.core.files import write_text


class Files:
    """``metrics.jsonl`` and ``tensorboard/`` of a run's folder.

    What ``write`` was given is with the operating system when it returns: a kill loses no record, and a full
    disk is told at once. Events are written here and not by tensorboardX's ``SummaryWriter``, whose thread
    ends at the first error: the eleventh event after that blocks the training for ever.

    Args:
      workdir: the run's folder.
      start: the step the run goes on from; later lines of an interrupted run are dropped.

    Raises:
      RunError: the files cannot be written.
    """

    def __init__(self, workdir: Path, start: int) -> None:
        from tensorboardX.proto.event_pb2 import SessionLog  # here: half a second that --list does not need

        self._workdir, folder = workdir, workdir / "tensorboard"
        with self._told():
            folder.mkdir(exist_ok=True)
            self._jsonl = _continued(workdir / "metrics.jsonl", start)
            name = f"events.out.tfevents.{time.time():.0f}.{platform.node()}.{start}"
            self._events = (folder / name).open("wb")
            _event(self._events, file_version="brain.Event:2")
            # Drops what an interrupted run wrote for later steps.
            _event(self._events, step=start + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """One line, and one event with all numbers.

        Raises:
          RunError: no space, or the folder is gone.
        """
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=_tag(name), simple_value=value) for name, value in numbers.items()]
        with self._told():
            self._jsonl.write(json.dumps({"step": step, **numbers}) + "\n")
            self._jsonl.flush()
            _event(self._events, step=step, summary=Summary(value=values))
            self._events.flush()

    def close(self) -> None:
        """Close both; what could not be written has been told of by ``write``."""
        for file in (self._jsonl, self._events):
            with contextlib.suppress(OSError):
                file.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"the records in {self._workdir} cannot be written ({error.strerror or error}): free some "
                "space or bring the folder back, then go on with the same command; checkpoints are kept"
            ) from error


@functools.lru_cache(maxsize=1024)
def _tag(name: str) -> str:
    """``name`` with the characters that TensorBoard takes."""
    return re.sub(r"[^-/\w.]", "_", name).lstrip("/")


def _event(file: BinaryIO, **fields: Any) -> None:
    """Append an event in the framing of TFRecord: length, its checksum, bytes, their checksum."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data = Event(wall_time=time.time(), **fields).SerializeToString()
    head = struct.pack("<Q", len(data))
    sums = (struct.pack("<I", masked_crc32c(part)) for part in (head, data))
    file.write(head + next(sums) + data + next(sums))


def _continued(path: Path, start: int) -> TextIO:
    """``path`` open for appending, without the lines after ``start`` that an interrupted run left."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= start:
                    kept.append(line + "\n")
            except (ValueError, KeyError):  # a line cut short by a kill
                continue
    write_text(path, "".join(kept))
    return path.open("a")
