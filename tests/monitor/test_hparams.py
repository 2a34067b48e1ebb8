"""TensorBoard's HParams of the runs of a sweep."""

from __future__ import annotations

import struct

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from tensorboardX.record_writer import masked_crc32c

from jaxtrain.monitor.hparams import write_hparams


def events(file):
    content, place, found = file.read_bytes(), 0, []
    while place < len(content):
        head = content[place : place + 8]
        (size,) = struct.unpack("<Q", head)
        data = content[place + 12 : place + 12 + size]
        sums = (
            struct.unpack("<I", content[place + 8 : place + 12]),
            struct.unpack("<I", content[place + 12 + size : place + 16 + size]),
        )
        assert sums == ((masked_crc32c(head),), (masked_crc32c(data),))
        found.append(Event.FromString(data))
        place += 16 + size
    return found


def test_settings_and_metrics_are_read_back(tmp_path):
    settings = {"optimizer.lr": 0.1, "model.widths": "(32, 64)", "model.residual": True, "seed": 3}
    write_hparams(tmp_path, {"optimizer.lr": 0.7}, {"accuracy": 0.1})
    write_hparams(tmp_path, settings, {"accuracy": 0.75, "loss": 0.5})
    (file,) = (tmp_path / "tensorboard").iterdir()  # the second took the place of the first
    values = [value for event in events(file) for value in event.summary.value]
    plugin = {
        value.tag: HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for value in values
        if value.metadata.plugin_data.plugin_name == "hparams"
    }
    start = plugin["_hparams_/session_start_info"].session_start_info.hparams
    assert {name: getattr(one, one.WhichOneof("kind")) for name, one in start.items()} == settings
    experiment = plugin["_hparams_/experiment"].experiment
    assert [info.name for info in experiment.hparam_infos] == list(settings)
    tags = [info.name.tag for info in experiment.metric_infos]
    assert tags == ["hparams/accuracy", "hparams/loss"] and "_hparams_/session_end_info" in plugin
    assert {v.tag: v.simple_value for v in values if v.tag in tags} == dict(
        zip(tags, (0.75, 0.5), strict=True)
    )


def test_tensorboard_reads_them(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_hparams(tmp_path, {"optimizer.lr": 0.1}, {"accuracy": 0.75})
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert read.Scalars("hparams/accuracy")[0].value == 0.75
    assert "_hparams_/session_start_info" in read.PluginTagToContent("hparams")
