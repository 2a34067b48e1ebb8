"""jaxtrain.sharding.cards and described: figures of GPUs, and meshes of GPUs that are not here."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import sys

import jax
import numpy as np
import pytest
from gpu_programs import needs_compiler

from jaxtrain import Experiment, assemble, data, fit, losses, models, optim, sharding
from jaxtrain.core import cuda_plugin
from jaxtrain.core.errors import InputError
from jaxtrain.models import target_gpu
from jaxtrain.monitor import peak_flops
from jaxtrain.program import device_limits
from jaxtrain.sharding import cards, described, multihost

GOOD = """
device_kind = "NVIDIA X1"
memory = 24_000_000_000
bandwidth = 1_000_000_000_000
capability = [8, 9]
link = 32_000_000_000
network = 1_000_000_000
peak = { bfloat16 = 100e12, float16 = 100e12, tf32 = 50e12, float32 = 25e12 }
cores = 100
fpus_per_core = 128
clock = 2
l2_cache = 50_000_000
shared_memory_per_block = 101_376
shared_memory_per_core = 102_400
nvlinks = 0
sources = ["made up"]
"""


@pytest.mark.parametrize("name", cards.card_names())
def test_a_card_agrees_with_the_peaks_of_mfu(name):
    card = cards.load_card(name)
    assert card.name == name and card.sources
    for precision, figure in (("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "tf32")):
        found = peak_flops.datasheet_peak(card.device_kind, precision)
        assert found.flops == card.peak[figure], precision
    with jax.default_matmul_precision("highest"):
        assert peak_flops.datasheet_peak(card.device_kind, "float32").flops == card.peak["float32"]


def test_a_file_describes_another_card(tmp_path):
    path = tmp_path / "x1.toml"
    path.write_text(GOOD)
    card = cards.load_card(str(path))
    assert (card.name, card.device_kind, card.capability) == ("x1", "NVIDIA X1", (8, 9))
    assert card.clock == 2.0 and card.nvlinks == 0 and card.peak["tf32"] == 50e12


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("memory = 24_000_000_000", "", "memory missing: give every figure"),
        ("memory =", "memroy =", "no field is called memroy: did you mean memory?"),
        ("24_000_000_000", '"24GB"', "memory is '24GB': give a whole number above 0"),
        ("24_000_000_000", "0", "memory is 0: give a whole number above 0"),
        ("clock = 2", "clock = true", "clock is True: give a finite number above 0"),
        ("clock = 2", "clock = inf", "clock is inf: give a finite number above 0"),
        ("[8, 9]", "8.9", "capability is 8.9: give the major and the minor number, such as [9, 0]"),
        ("[8, 9]", "[-9, 0]", "capability is [-9, 0]: give the major and the minor number"),
        ("[8, 9]", "[9, 10]", "capability is [9, 10]: give the major and the minor number"),
        ("NVIDIA X1", "X1\\ncores", "device_kind is 'X1\\ncores': give a name of at most 100 letters"),
        ("NVIDIA X1", 'X1\\" cores: 1 name: \\"', "give a name of at most 100 letters, digits, spaces"),
        ("clock = 2", "clock = " + 9999 * "[", "is not a TOML file"),
        ("tf32 = 50e12, ", "", "give FLOP/s above 0 for each of bfloat16, float16, tf32, float32"),
        ('["made up"]', '"made up"', "sources is 'made up': give a list of texts"),
        ("memory =", "memory", "is not a TOML file"),
    ],
)
def test_a_wrong_file_is_one_line(old, new, says, tmp_path):
    path = tmp_path / "x1.toml"
    assert GOOD.count(old) == 1
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(InputError) as caught:
        cards.load_card(str(path))
    message = str(caught.value)
    assert says in message and "x1.toml" in message and "\n" not in message


def test_an_unknown_card_is_one_line(tmp_path):
    for name in ("h10", "H100"):
        with pytest.raises(InputError, match=rf"--for {name}: no card has this name: .*did you mean h100\?$"):
            cards.load_card(name)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        cards.load_card(str(tmp_path / "missing.toml"))
    with pytest.raises(InputError, match=r"^~nobody-here/x.toml: this user has no home folder"):
        cards.load_card("~nobody-here/x.toml")


def test_what_xla_says_about_a_card_is_one_line_that_helps():
    card = dataclasses.replace(cards.load_card("h100"), capability=(99, 9))
    old = jax.errors.JaxRuntimeError("UNIMPLEMENTED: /usr/bin/ptxas ptxas too old. Falling back")
    said = described.why_not_compiled(old, card)
    assert said.startswith("NVIDIA's assembler does not know compute capability 99.9: install a newer one")
    other = jax.errors.JaxRuntimeError("INTERNAL: first\nsecond")
    assert described.why_not_compiled(other, card) == "INTERNAL: first"


@needs_compiler
def test_a_figure_out_of_range_is_one_line():
    card = dataclasses.replace(cards.load_card("h100"), cores=10**12)
    with pytest.raises(InputError, match=r"^XLA cannot compile for h100: a figure of the card is out of"):
        described.described_devices(card)


@needs_compiler
def test_what_would_run_on_described_devices_is_one_line(tmp_path):
    mesh = sharding.make_mesh(described.described_devices(cards.load_card("h100"), per_host=2), {"fsdp": 2})
    source = data.Digits("test")
    experiment = Experiment(
        model=models.MLP(widths=(8,), classes=10),
        train=source,
        test=source,
        loss=losses.CrossEntropy(),
        optimizer=optim.SGD(lr=0.1),
        batch=60,
        epochs=1,
    )
    program = assemble(experiment, mesh)
    args = (program.abstract_state, program.train.batch(0), program.key)
    test = program.evals["test"]
    for run in (
        program.init,
        lambda: program.train_step(*args),
        lambda: test.step(program.abstract_state, test.loader.batch(0)),
    ):
        with pytest.raises(InputError, match="described NVIDIA H100 80GB HBM3, which can only be compiled"):
            run()
    assert "num_partitions = 2" in program.train_step.lower(*args).as_text()
    with pytest.raises(InputError, match=r"^mesh describes GPUs that are not here \(NVIDIA H100 80GB HBM3\)"):
        fit(experiment, folder=tmp_path / "run", mesh=mesh)
    assert not (tmp_path / "run").exists()


def test_missing_or_other_wheels_are_one_line_with_the_command(monkeypatch):
    def versions(**found):
        def version(package):
            if package not in found:
                raise importlib.metadata.PackageNotFoundError(package)
            return found[package]

        monkeypatch.setattr(importlib.metadata, "version", version)

    monkeypatch.setattr(described, "_has_toolkit", lambda: False)
    jax_wheels = {"jax-cuda12-plugin": jax.__version__, "jax-cuda12-pjrt": jax.__version__}
    install = f"pip install jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"
    for found in ({}, {**jax_wheels, "jax-cuda12-pjrt": "0.9.0"}):
        versions(**found)
        with pytest.raises(InputError, match=r"^compiling for h100 needs ") as caught:
            described.described_devices(cards.load_card("h100"))
        assert install in str(caught.value) and "\n" not in str(caught.value)
    versions(**jax_wheels)
    assert described.compiler_problem() == "needs NVIDIA's assembler: pip install nvidia-cuda-nvcc-cu12"
    versions(**jax_wheels, **{"nvidia-cuda-nvcc-cu12": "12.9.86"})
    assert described.compiler_problem() is None
    cuda13 = {name.replace("12", "13"): version for name, version in jax_wheels.items()}
    versions(**cuda13, **{"jax-cuda12-plugin": "0.1"})  # a stale one beside it
    assert described.compiler_problem() == "needs NVIDIA's assembler: pip install nvidia-cuda-nvcc"
    versions(**cuda13, **jax_wheels, **{"nvidia-cuda-nvcc": "13.0.88"})
    assert described.compiler_problem() is None
    versions(**cuda13)
    monkeypatch.setattr(
        described, "_has_toolkit", lambda: True
    )  # its assembler is used in place of the wheel's
    assert described.compiler_problem() is None
    versions(**{"jax-cuda13-plugin": "0.1"})
    assert ", and this is installed: jax-cuda13-plugin 0.1: pip install" in str(described.compiler_problem())


@needs_compiler
def test_a_mesh_of_described_devices_has_shapes_for_arrays(monkeypatch):
    card = cards.load_card("h200")
    mesh = sharding.make_mesh(described.described_devices(card, hosts=2, per_host=2), {"data": 2, "fsdp": 2})
    assert described.card_of(mesh) == card and jax.default_backend() == "cpu"
    assert sharding.describe_mesh(mesh) == "4 × NVIDIA H200 (data=2,fsdp=2), 2 hosts"
    assert [device.process_index for device in mesh.devices.flat] == [0, 0, 1, 1]
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    limit = device_limits.limit_of(mesh)
    assert limit.bytes == sharding.device_memory(mesh) == int(0.75 * card.memory)
    assert "75 % of the card's 151.40 GB" in limit.text
    assert device_limits.limit_of(mesh, "80GB").bytes == 60_000_000_000

    rows = np.zeros((2, 3), np.float64)  # those of the first host
    split = sharding.batch_split(mesh)
    made = multihost.put_local_rows({"x": rows}, split, 4)["x"]
    assert made.shape == (4, 3) and made.dtype == np.float32 and made.sharding == split
    whole = multihost.put_replicated(rows, sharding.replicated(mesh))
    assert whole.shape == (2, 3) and isinstance(whole, jax.ShapeDtypeStruct)


def test_programs_that_jax_cannot_load_again_are_not_cached():
    before = jax.config.jax_enable_compilation_cache
    with described.without_compilation_cache():
        assert not jax.config.jax_enable_compilation_cache
    assert jax.config.jax_enable_compilation_cache == before


def test_attention_is_chosen_for_the_version_of_cudnn_that_xla_is_told():
    major, minor, patch = described.CUDNN
    assert 10_000 * major + 100 * minor + patch == target_gpu.CUDNN


@pytest.mark.full("[cpu]")
@needs_compiler
@pytest.mark.skipif(cuda_plugin.has_driver(), reason="this machine has an NVIDIA driver")
@pytest.mark.parametrize("platforms", ["", "cpu"])
def test_the_plugin_is_quiet_without_a_driver(platforms, python):
    code = """
import sys
from jaxtrain.core import cuda_plugin
with cuda_plugin.quiet_without_driver():
    import jax
    sys.stderr.write("kept\\n")
print(jax.default_backend())
"""
    done = python("-c", code, JAX_PLATFORMS=platforms, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    assert (done.returncode, done.stdout, done.stderr) == (0, "cpu\n", "kept\n")
