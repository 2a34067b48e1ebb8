"""jaxtrain.monitor.peak_flops and doctor --peak: the table, what is measured, and where it is kept."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import jax
import pytest

from jaxtrain import __main__ as verbs
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.monitor import peak_flops

DEVICE = jax.devices()[0]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """No test reads or writes the cache of whoever runs it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches" / "jaxtrain"


@pytest.mark.parametrize(
    ("kind", "bfloat16", "float32", "float16"),
    [
        ("NVIDIA A100-SXM4-40GB", 312, 156, 312),
        ("NVIDIA A100 80GB PCIe", 312, 156, 312),
        ("NVIDIA H100 80GB HBM3", 989.5, 494.5, 989.5),
        ("NVIDIA H100 PCIe", 756.5, 378, 756.5),
        ("NVIDIA H200", 989.5, 494.5, 989.5),
        ("NVIDIA L4", 121, 60, 121),
        ("NVIDIA L40S", 362, 183, 362),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6, 165.2),
        ("Tesla T4", None, 8.1, 65),
        ("Tesla V100-SXM2-16GB", None, 15.7, 125),
        ("cpu", None, None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None, None),
        ("NVIDIA A100X", None, None, None),
        ("NVIDIA A10G", None, None, None),
    ],
)
def test_table_knows_a_device_by_its_whole_name(kind, bfloat16, float32, float16):
    for precision, figure in {"bfloat16": bfloat16, "float32": float32, "float16": float16}.items():
        expected = None if figure is None else peak_flops.Peak(figure * 1e12, "table")
        assert peak_flops.datasheet_peak(kind, precision) == expected
    assert peak_flops.datasheet_peak(kind, "float64") is None


def test_float32_without_tf32_has_its_own_peak():
    with jax.default_matmul_precision("highest"):
        assert peak_flops.datasheet_peak("NVIDIA H200", "float32").flops == 67e12
        assert peak_flops.datasheet_peak("NVIDIA H200", "bfloat16").flops == 989.5e12


def test_no_row_is_out_of_line_with_the_others():
    """Half precision is 2 to 32 times float32 and twice TF32; a typing error is ten times."""
    for row in peak_flops.TABLE.values():
        assert 1.9 <= row.half / row.float32 <= 32
        assert row.tf32 is None or row.half / row.tf32 == pytest.approx(2, rel=0.02)
        assert (row.tf32 is None) == (not row.bfloat16)


def test_peaks_of_gpus_add_up_and_those_of_cpu_devices_do_not(monkeypatch):
    gpus = [SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")] * 8
    assert peak_flops.total_peak_flops(gpus, "bfloat16") == peak_flops.Peak(8 * 989.5e12, "table")
    assert (
        peak_flops.total_peak_flops(
            [*gpus, SimpleNamespace(platform="gpu", device_kind="NVIDIA H300")], "bfloat16"
        )
        is None
    )
    assert peak_flops.total_peak_flops(jax.devices(), "float32") is None
    peak_flops.store_peak(DEVICE, "float32", peak_flops.Peak(1e9, "measured 2026-11-22"))
    assert peak_flops.total_peak_flops(jax.devices(), "float32").flops == 1e9
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert peak_flops.total_peak_flops(jax.devices(), "float32") is None


def test_what_is_measured_is_kept_for_this_user_alone(home):
    assert peak_flops.peak_flops(DEVICE, "float32") is None
    for precision, flops in (("float32", 1e9), ("bfloat16", 2e9), ("float32", 3e9)):
        assert (
            peak_flops.store_peak(DEVICE, precision, peak_flops.Peak(flops, "measured 2026-11-22"))
            == home / "peaks.json"
        )
    assert peak_flops.peak_flops(DEVICE, "float32") == peak_flops.Peak(3e9, "measured 2026-11-22")
    assert (
        peak_flops.peak_flops(DEVICE, "bfloat16").flops == 2e9
        and peak_flops.peak_flops(DEVICE, "float16") is None
    )
    assert home.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in home.iterdir()] == ["peaks.json"]


def test_another_number_of_cores_has_no_peak(monkeypatch):
    peak_flops.store_peak(DEVICE, "float32", peak_flops.Peak(1e9, "measured 2026-11-22"))
    monkeypatch.setattr(peak_flops, "cores", lambda: 999)
    assert peak_flops.peak_flops(DEVICE, "float32") is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"%s": 5}', '{"%s": {"flops": -1, "source": "x"}}'])
def test_damaged_file_is_no_peak_and_is_written_anew(home, text):
    home.mkdir(parents=True)
    (home / "peaks.json").write_text(text.replace("%s", f"{peak_flops.name(DEVICE)}, float32"))
    assert peak_flops.peak_flops(DEVICE, "float32") is None
    peak_flops.store_peak(DEVICE, "float32", peak_flops.Peak(1e9, "measured 2026-11-22"))
    assert peak_flops.peak_flops(DEVICE, "float32").flops == 1e9


def test_relative_cache_folder_is_ignored(monkeypatch, tmp_path):
    """As the XDG rules say."""
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert peak_flops.stored_peak() == tmp_path / ".cache" / "jaxtrain" / "peaks.json"


def test_folder_that_cannot_be_written_is_told_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RunError, match="set XDG_CACHE_HOME to a folder of your own") as raised:
        peak_flops.store_peak(DEVICE, "float32", peak_flops.Peak(1e9, "measured 2026-11-22"))
    assert "\n" not in str(raised.value)


def test_measured_rate_is_of_the_best_size(monkeypatch):
    clock = iter([0.0, 1.0, 1.0, 1.5] * 3)  # a second for the first size, half for the second
    monkeypatch.setattr(peak_flops, "_products", lambda *_: lambda: None)
    monkeypatch.setattr(peak_flops.time, "perf_counter", lambda: next(clock))
    found = peak_flops.measure(DEVICE, "float32", rounds=3, sizes=(10, 20))
    assert found.flops == peak_flops.CHAIN * 2 * 20**3 / 0.5
    assert found.source.startswith("measured 20")


def test_products_are_in_the_precision_and_of_numbers_that_stay_alike():
    result = peak_flops._products(DEVICE, "bfloat16", 64)()
    assert result.dtype == "bfloat16" and result.shape == (64, 64)
    assert 0.5 < float(result.astype("float32").std()) < 2
    with pytest.raises(
        InputError, match="precision 'int8': a peak is measured in float32, bfloat16, float16"
    ):
        peak_flops.measure(DEVICE, "int8")


def test_doctor_measures_tells_and_keeps(monkeypatch, capsys, home):
    monkeypatch.setattr(peak_flops, "CPU_SIZES", (32, 64))
    assert verbs.main(["doctor", "--peak", "float32"]) == 0
    out = capsys.readouterr().out
    kept = json.loads((home / "peaks.json").read_text())
    assert list(kept) == [f"{peak_flops.name(DEVICE)}, float32"]
    assert 0 < peak_flops.peak_flops(DEVICE, "float32").flops < math.inf
    assert "TFLOP/s, in no table" in out and "cores" in out and "versions" not in out
    monkeypatch.setattr(peak_flops, "datasheet_peak", lambda kind, precision: peak_flops.Peak(1e15, "table"))
    assert verbs.main(["doctor", "--peak", "float32"]) == 0
    assert "0 % of the table's 1000, which counts for MFU" in capsys.readouterr().out
    assert verbs.main(["doctor", "--peak", "int4"]) == 2
    assert "--peak int4: it must be one of float32" in capsys.readouterr().err
