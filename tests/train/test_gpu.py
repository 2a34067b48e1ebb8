"""What can only be seen on an NVIDIA GPU: ``JAXTRAIN_TEST_GPU=1 pytest -m gpu tests/train/test_gpu.py``."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtrain import checkpoint, data, losses, models, monitor, optim, sharding
from jaxtrain.cli import doctor
from jaxtrain.core.errors import RunError
from jaxtrain.core.signals import Request
from jaxtrain.experiment import Experiment, find
from jaxtrain.experiment.overrides import override
from jaxtrain.monitor.console import Plain
from jaxtrain.program import Cadence, assemble
from jaxtrain.step import guard
from jaxtrain.train import environment, loop

pytestmark = pytest.mark.gpu

DIGITS = Experiment(
    model=models.CNN(widths=(16, 32), convs=2),
    train=data.Synthetic(n=1437, shape=(8, 8, 1)),  # no scikit-learn, which GPU machines may lack
    test=data.Synthetic(n=360, shape=(8, 8, 1), split="test"),
    loss=losses.CrossEntropy(smoothing=0.1),
    optimizer=optim.SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    augment=(data.Crop(pad=1),),
    preprocess=(data.Normalise(),),
    batch=128,
    epochs=4,
    log_every=10,
)

RESUME = """
import signal
from pathlib import Path

import jax

from jaxtrain import checkpoint, sharding
from jaxtrain.experiment import find
from jaxtrain.experiment import override
from jaxtrain.program import assemble
from jaxtrain.train import loop
from jaxtrain.monitor.console import Plain
from jaxtrain.core.signals import Stopped


class StopAt(Plain):
    def advance(self, step):
        if step == 10:
            signal.raise_signal(signal.SIGTERM)


experiment = override(find("digits_cnn").load()[0], ["epochs=2"])
program = assemble(experiment, sharding.make_mesh(jax.devices()[:1]))
loop.fit(program, Path("straight"), Plain())
try:
    loop.fit(program, Path("broken"), StopAt())
except Stopped:
    print("stopped")
assert loop.fit(program, Path("broken"), Plain())["resumed_from"] == 10

states = []
for folder in ("straight", "broken"):
    with checkpoint.open(folder) as saved:
        states.append(jax.device_get(saved.restore(saved.latest(), program.abstract_state)))
equal = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), *states)
print("bitwise equal" if all(jax.tree.leaves(equal)) else equal)
"""

MEMORY = """
import json
import sys

import jax
import numpy as np

from jaxtrain import data, losses, models, optim, plan, sharding
from jaxtrain.experiment import Experiment
from jaxtrain.program import assemble

text = data.Arrays({"tokens": np.zeros((64, 256), np.uint8), "label": np.zeros((64, 256), np.int32)})
image = data.Synthetic(n=1024, shape=(32, 32, 3))
source, model, preprocess = {
    "cnn": (image, models.CNN(widths=(64, 128, 256), convs=2), (data.Normalise(),)),
    "gpt": (text, models.GPT(vocab=256, context=256, width=512, depth=6, heads=8), ()),
}[sys.argv[1]]
experiment = Experiment(
    model=model,
    train=source,
    test=source,
    loss=losses.CrossEntropy(),
    optimizer=optim.AdamW(lr=1e-3),
    preprocess=preprocess,
    batch=min(len(source), 1024),
    epochs=2,
)
program = assemble(experiment, sharding.make_mesh(jax.devices()[:1]))
planned = plan.measure(program, count=False)
state = program.init()
for step in range(2):
    state, metrics = program.train_step(state, program.train.batch(step), program.key)
    jax.block_until_ready(metrics)
print(json.dumps([planned.bytes, jax.devices()[0].memory_stats()["peak_bytes_in_use"]]))
"""


@pytest.fixture(autouse=True)
def _gpu():
    if jax.default_backend() not in ("gpu", "cuda"):
        pytest.skip("JAX sees no GPU")


@dataclasses.dataclass(frozen=True)
class Nans:
    """A stage with a mistake in it."""

    def __call__(self, batch, key):
        return {**batch, "image": jax.numpy.full(batch["image"].shape, jax.numpy.nan)}


class NoSaves(Cadence):
    """Never saves."""

    def saves_after(self, step: int) -> bool:
        return False


def test_a_step_is_that_of_the_cpu():
    """The same update on both, but for rounding: full float32 on the GPU, no TF32."""
    after = []
    with jax.default_matmul_precision("highest"):
        for device in (jax.devices()[0], jax.devices("cpu")[0]):
            program = assemble(DIGITS, sharding.make_mesh([device]))
            state, metrics = program.train_step(program.init(), program.train.batch(0), program.key)
            after.append((jax.device_get(state.params), monitor.merge_all(metrics.rows())))
    (gpu, gpu_metrics), (cpu, cpu_metrics) = after
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gpu, cpu)
    assert gpu_metrics["loss"] == pytest.approx(cpu_metrics["loss"], rel=1e-4)


@pytest.mark.parametrize(("policy", "steps_per_execution"), [("stop", 1), ("skip", 8)])
def test_the_loop_reads_nothing_from_the_device(tmp_path, policy, steps_per_execution):
    """But the metrics of finished updates, of which ``InFlight`` says so itself.

    Training, logging and evaluation; ``copy_to_host_async`` counts as a read where JAX guards it.
    """
    pytest.importorskip("tensorboardX")
    exp = dataclasses.replace(DIGITS, guard=policy, steps_per_execution=steps_per_execution)
    program = assemble(exp, sharding.make_mesh(jax.devices()[:1]))
    program = dataclasses.replace(program, cadence=NoSaves(**vars(program.cadence)))
    console = Plain()
    with (
        checkpoint.open(tmp_path) as saved,
        monitor.open(tmp_path, console, start=0, log_every=10, examples=128) as record,
    ):
        state = program.init()
        with jax.transfer_guard_device_to_host("disallow"):
            state = loop._train(program, state, 0, saved, record, console, Request())
            record.flush()
            loop.evaluate(program, state, "test", console)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == program.steps


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_several_updates_at_once_are_those_one_by_one(precision):
    """A dense network: bit for bit on a CPU; here XLA may choose other kernels inside a loop."""
    exp = dataclasses.replace(DIGITS, model=models.MLP(widths=(64,)), augment=(), precision=precision)
    with jax.default_matmul_precision("highest"):
        program = assemble(exp, sharding.make_mesh(jax.devices()[:1]))
        one, several = program.init(), program.init()
        for step in range(8):
            one, _ = program.train_step(one, program.train.batch(step), program.key)
        batches, shared = program.train.batches(0, 8)
        several, metrics = program.train_steps(several, batches, program.key, shared)
    assert metrics["loss"].total.shape == (8,) and int(several.step) == int(one.step) == 8
    rtol, atol = (1e-4, 1e-6) if precision == "float32" else (5e-2, 5e-3)
    one, several = (jax.device_get(state.params) for state in (one, several))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), one, several)


def test_nan_through_relus_is_stopped_by_the_guard(tmp_path):
    """A ReLU can hide NaN from the loss; the update is not applied, and the run ends."""
    pytest.importorskip("tensorboardX")
    model = models.MLP(widths=(32,))  # no BatchNorm, whose statistics would show NaN
    exp = dataclasses.replace(DIGITS, model=model, augment=(Nans(),))
    program = assemble(exp, sharding.make_mesh(jax.devices()[:1]))
    before = jax.device_get(program.init().params)
    state, metrics = program.train_step(program.init(), program.train.batch(0), program.key)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before)
    assert guard.bad_values(jax.device_get(metrics["guard"]).by_name())
    with pytest.raises(RunError, match="at step 1: the update was not applied"):
        loop.fit(program, tmp_path, Plain())


def test_the_guard_of_that_test_is_awake():
    """Otherwise it would prove nothing."""
    with jax.transfer_guard_device_to_host("disallow"), pytest.raises(Exception, match="isallowed"):
        float(jax.numpy.arange(3).sum())


def test_resume_is_bitwise_with_deterministic_ops(tmp_path):
    """Straight, and stopped at step 10 and gone on with: the same bits."""
    pytest.importorskip("sklearn")
    pytest.importorskip("tensorboardX")
    env = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip(),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", RESUME], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "stopped" in done.stdout
    assert done.stdout.splitlines()[-1] == "bitwise equal"


def test_two_runs_with_deterministic_are_the_same_bits(tmp_path):
    """In fresh processes, each of which chooses its kernels anew."""
    pytest.importorskip("sklearn")
    pytest.importorskip("tensorboardX")
    env = {
        **{name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"},
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    words = ["-m", "jaxtrain.run", "--experiment", "digits_cnn", "--set", "epochs=2", "--deterministic"]
    for folder in ("one", "other"):
        done = subprocess.run(
            [sys.executable, *words, "--workdir", folder],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        record = json.loads((tmp_path / folder / "config.json").read_text())
        assert environment.DETERMINISTIC_FLAG in record["bits"]["xla_flags"]
    program = assemble(override(find("digits_cnn").load()[0], ["epochs=2"]), sharding.make_mesh())
    states = []
    for folder in ("one", "other"):
        with checkpoint.open(tmp_path / folder) as saved:
            states.append(jax.device_get(saved.restore(saved.latest(), program.abstract_state)))
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize("name", ["cnn", "gpt"])
def test_what_plan_says_is_what_two_steps_take(name, tmp_path):
    """In a process of its own: the peak is that of the whole process."""
    env = {
        **os.environ,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, name],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    parts, peak = json.loads(done.stdout.splitlines()[-1])
    assert sum(parts.values()) == pytest.approx(peak, rel=0.1), parts


def test_doctor_reports_the_memory_of_the_gpu():
    """``memory_stats`` gives a limit, and doctor shows it beside the device."""
    device = jax.local_devices()[0]
    assert device.memory_stats()["bytes_limit"] > 2**30
    problems: list[str] = []
    rows = doctor._devices(problems)
    assert "GiB" in rows[str(device)] and not problems
