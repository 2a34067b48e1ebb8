"""Write a run's records: ``metrics.jsonl`` and TensorBoard events."""

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
from jaxtrain.core.files import to_json, write_text


class Files:
    """``metrics.jsonl`` and ``tensorboard/`` of a run's folder.

    ``write`` returns once the operating system has the data: a kill loses no record, and a full disk raises
    immediately. tensorboardX's ``SummaryWriter`` is not used because its thread ends at the first error: the
    eleventh event after that blocks training forever.

    Args:
      workdir: the run's folder.
      start: the step the run resumes from; later records of an interrupted run are dropped.

    Raises:
      RunError: the files cannot be written.
    """

    def __init__(self, workdir: Path, start: int) -> None:
        from tensorboardX.proto.event_pb2 import SessionLog  # half a second, which --list does not need

        self._workdir, folder = workdir, workdir / "tensorboard"
        with self._explain_errors():
            folder.mkdir(exist_ok=True)
            self._jsonl = _open_at(workdir / "metrics.jsonl", start)
            name = f"events.out.tfevents.{time.time():.0f}.{platform.node()}.{start}"
            self._events = (folder / name).open("wb")
            append_event(self._events, file_version="brain.Event:2")
            # TensorBoard then drops what an interrupted run wrote for later steps.
            append_event(self._events, step=start + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write one line and one event with all numbers; NaN and infinity are null in the line.

        Raises:
          RunError: the disk is full, or the folder is gone.
        """
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag_name(name), simple_value=value) for name, value in numbers.items()]
        with self._explain_errors():
            self._jsonl.write(to_json({"step": step, **numbers}) + "\n")
            self._jsonl.flush()
            append_event(self._events, step=step, summary=Summary(value=values))
            self._events.flush()

    def write_pictures(self, step: int, pictures: Mapping[str, bytes]) -> None:
        """Write PNGs as events for TensorBoard's tab of images.

        Raises:
          RunError: the disk is full, or the folder is gone.
        """
        from tensorboardX.proto.summary_pb2 import Summary

        values = []
        for name, png in pictures.items():
            width, height = struct.unpack(">II", png[16:24])  # of the PNG's header
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
            values.append(Summary.Value(tag=tag_name(name), image=image))
        with self._explain_errors():
            append_event(self._events, step=step, summary=Summary(value=values))
            self._events.flush()

    def close(self) -> None:
        """Close both files; ``write`` has raised for whatever could not be written."""
        for file in (self._jsonl, self._events):
            with contextlib.suppress(OSError):
                file.close()

    @contextlib.contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"the records in {self._workdir} cannot be written ({error.strerror or error}): free disk "
                "space or restore the folder, then resume with the same command; checkpoints are kept"
            ) from error


@functools.lru_cache(maxsize=1024)
def tag_name(name: str) -> str:
    """Replace the characters of ``name`` that TensorBoard rejects."""
    return re.sub(r"[^-/\w.]", "_", name).lstrip("/")


def append_event(file: BinaryIO, **fields: Any) -> None:
    """Append an event as a TFRecord: length, its checksum, bytes, their checksum."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data = Event(wall_time=time.time(), **fields).SerializeToString()
    head = struct.pack("<Q", len(data))
    sums = (struct.pack("<I", masked_crc32c(part)) for part in (head, data))
    file.write(head + next(sums) + data + next(sums))


def _open_at(path: Path, start: int) -> TextIO:
    """Open ``path`` for appending, after dropping the lines of later steps than ``start``."""
    lines = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= start:
                    lines.append(line + "\n")
            except (ValueError, KeyError):  # a line truncated by a kill
                continue
    write_text(path, "".join(lines))
    return path.open("a")
