"""Write the settings and the result of a sweep's run for TensorBoard's HParams page."""

from __future__ import annotations

import io
import platform
from collections.abc import Mapping
from pathlib import Path

from jaxtrain.core.files import write_bytes
from jaxtrain.monitor.files import append_event, tag_name


def write_hparams(
    folder: Path, settings: Mapping[str, bool | int | float | str], metrics: Mapping[str, float]
) -> None:
    """Write one event file in ``folder/tensorboard``, in place of an earlier one.

    Args:
      folder: the run's folder.
      settings: what differs between the runs of the sweep, by path.
      metrics: what they are compared by; shown as ``hparams/NAME``.
    """
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.summary import hparams

    tags = {f"hparams/{tag_name(name)}": float(value) for name, value in metrics.items()}
    file = io.BytesIO()
    append_event(file, file_version="brain.Event:2")
    for summary in hparams(dict(settings), tags):
        append_event(file, summary=summary)
    scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in tags.items()]
    append_event(file, summary=Summary(value=scalars))
    path = folder / "tensorboard" / f"events.out.tfevents.0.{platform.node()}.hparams"
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, file.getvalue())
