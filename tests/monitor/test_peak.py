"""jaxtrain.monitor.peak_flops and benchmarks.peak_flops: the table, and peaks measured and stored."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import jax
import pytest

from benchmarks import peak_flops as measuring
from jaxtrain.cli import doctor
from jaxtrain.core.errors import RunError
from jaxtrain.monitor import peak_flops

DEVICE = jax.devices()[0]
MEASURED = "measured 2026-11-22"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    """Keep the tests away from the user's own cache; returns the folder used instead."""
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
def test_table_matches_the_full_name_of_a_device(kind, bfloat16, float32, float16):
    for precision, figure in {"bfloat16": bfloat16, "float32": float32, "float16": float16}.items():
        expected = None if figure is None else peak_flops.Peak(figure * 1e12, "table")
        assert peak_flops.datasheet_peak(kind, precision) == expected
    assert peak_flops.datasheet_peak(kind, "float64") is None


def test_float32_without_tf32_has_its_own_peak():
    with jax.default_matmul_precision("highest"):
        assert peak_flops.datasheet_peak("NVIDIA H200", "float32").flops == 67e12
        assert peak_flops.datasheet_peak("NVIDIA H200", "bfloat16").flops == 989.5e12


def test_ratios_between_precisions_are_plausible():
    """Half precision is 2 to 32 times float32 and twice TF32; a typing error is a factor of ten."""
    for row in peak_flops.TABLE.values():
        assert 1.9 <= row.half / row.float32 <= 32
        assert row.tf32 is None or row.half / row.tf32 == pytest.approx(2, rel=0.02)
        assert (row.tf32 is None) == (not row.bfloat16)


def test_peaks_of_gpus_add_up_and_those_of_cpu_devices_do_not(monkeypatch):
    gpus = [SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")] * 8
    unknown = SimpleNamespace(platform="gpu", device_kind="NVIDIA H300")
    assert peak_flops.total_peak_flops(gpus, "bfloat16") == peak_flops.Peak(8 * 989.5e12, "table")
    assert peak_flops.total_peak_flops([*gpus, unknown], "bfloat16") is None
    assert peak_flops.total_peak_flops(jax.devices(), "float32") is None
    measuring.store(DEVICE, "float32", peak_flops.Peak(1e9, MEASURED))
    assert peak_flops.total_peak_flops(jax.devices(), "float32").flops == 1e9
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert peak_flops.total_peak_flops(jax.devices(), "float32") is None


def test_measured_peaks_are_stored_privately(cache_folder):
    file = cache_folder / "peaks.json"
    assert peak_flops.peak_flops(DEVICE, "float32") is None
    for precision, flops in (("float32", 1e9), ("bfloat16", 2e9), ("float32", 3e9)):
        assert measuring.store(DEVICE, precision, peak_flops.Peak(flops, MEASURED)) == file
    assert peak_flops.peak_flops(DEVICE, "float32") == peak_flops.Peak(3e9, MEASURED)
    assert peak_flops.peak_flops(DEVICE, "bfloat16").flops == 2e9
    assert peak_flops.peak_flops(DEVICE, "float16") is None
    assert cache_folder.stat().st_mode & 0o777 == 0o700 and file.stat().st_mode & 0o077 == 0
    assert [path.name for path in cache_folder.iterdir()] == ["peaks.json"]


def test_peak_depends_on_the_number_of_cores(monkeypatch):
    measuring.store(DEVICE, "float32", peak_flops.Peak(1e9, MEASURED))
    monkeypatch.setattr(peak_flops, "device_name", lambda device: "the same CPU, 999 cores")
    assert peak_flops.peak_flops(DEVICE, "float32") is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"%s": 5}', '{"%s": {"flops": -1, "source": "x"}}'])
def test_damaged_file_has_no_peak_and_is_replaced(cache_folder, text):
    cache_folder.mkdir(parents=True)
    (cache_folder / "peaks.json").write_text(text.replace("%s", peak_flops.measured_key(DEVICE, "float32")))
    assert peak_flops.peak_flops(DEVICE, "float32") is None
    measuring.store(DEVICE, "float32", peak_flops.Peak(1e9, MEASURED))
    assert peak_flops.peak_flops(DEVICE, "float32").flops == 1e9


def test_relative_cache_folder_is_ignored(monkeypatch, tmp_path):
    """As the XDG specification requires."""
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert peak_flops.measured_file() == tmp_path / ".cache" / "jaxtrain" / "peaks.json"


def test_unwritable_folder_is_a_one_line_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RunError, match="set XDG_CACHE_HOME to a folder you can write to") as raised:
        measuring.store(DEVICE, "float32", peak_flops.Peak(1e9, MEASURED))
    assert "\n" not in str(raised.value)


def test_measured_rate_is_of_the_best_size(monkeypatch):
    clock = iter([0.0, 1.0, 1.0, 1.5] * 3)  # a second for the first size, half for the second
    monkeypatch.setattr(measuring, "products", lambda *_: lambda: None)
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(clock))
    rates = measuring.measure(DEVICE, "float32", rounds=3, sizes=(10, 20))
    assert rates == [measuring.CHAIN * 2 * 20**3 / 0.5] * 3


def test_products_keep_their_precision_and_scale():
    result = measuring.products(DEVICE, "bfloat16", 64)()
    assert result.dtype == "bfloat16" and result.shape == (64, 64)
    assert 0.5 < float(result.astype("float32").std()) < 2


def test_benchmark_prints_and_stores_the_peak_and_doctor_shows_it(monkeypatch, capsys):
    assert doctor._devices([])["peak TFLOP/s"] == (
        "unknown, so runs report no MFU; measure it from a checkout: python -m benchmarks.peak_flops"
    )
    monkeypatch.setattr(measuring, "CPU_SIZES", (32, 64))
    monkeypatch.setattr(sys, "argv", ["peak_flops", "--precisions", "float32", "--rounds", "3"])
    measuring.main()
    [printed] = json.loads(capsys.readouterr().out)["results"]
    stored = peak_flops.peak_flops(DEVICE, "float32")
    assert printed["unit"] == "TFLOP/s" and printed["median"] * 1e12 == pytest.approx(stored.flops)
    assert doctor._devices([])["peak TFLOP/s"] == f"float32 {stored.flops / 1e12:.4g} ({stored.source})"


def test_benchmark_reports_a_device_without_memory(monkeypatch):
    def exhaust(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")

    monkeypatch.setattr(measuring, "products", exhaust)
    with pytest.raises(RunError, match="cannot multiply float32 matrices of 10 rows: RESOURCE_EXHAUSTED"):
        measuring.measure(DEVICE, "float32", sizes=(10,))
