"""compress="int8": rounded products and their gradients against NumPy, and exports that equal evaluations."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh
from tiny import EXPERIMENT

import jaxtrain
from jaxtrain import checkpoint, models, monitor, optim, sharding
from jaxtrain.compress import Distil, Prune, fake_quantize, quantize
from jaxtrain.core.errors import InputError
from jaxtrain.core.types import RANGES, Model
from jaxtrain.experiment import Experiment, config_hash, config_text, override
from jaxtrain.export import quantized, write
from jaxtrain.export.trained import Trained, model_outputs
from jaxtrain.models import compute_in
from jaxtrain.program import assemble
from jaxtrain.sharding import rules

INT8 = dataclasses.replace(EXPERIMENT, compress="int8")


def linear(params: Any, extra: Any, batch: Any, *, train: bool, key: Any) -> tuple[Any, Any]:
    return batch["x"] @ params["kernel"], extra


def rounded(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(x / scale), -128, 127) * scale


def dense(rng: np.random.Generator) -> tuple[Model, dict[str, Any], dict[str, Any]]:
    kernel = rng.normal(size=(16, 5)).astype(np.float32)
    model = fake_quantize(Model(lambda key, batch: ({"kernel": jnp.asarray(kernel)}, {}), linear))
    batch = {"x": rng.normal(size=(8, 16)).astype(np.float32)}
    params, extra = model.init(jax.random.key(0), batch)
    assert extra == {RANGES: {"params/kernel": 0.0}}
    return model, params, batch


def test_operands_are_rounded_and_gradients_pass_within_the_range() -> None:
    """Backward it is the product's gradient at the rounded operands, cut at the range."""
    rng = np.random.default_rng(0)
    model, params, batch = dense(rng)
    kernel, x, cotangent = (
        np.asarray(params["kernel"]),
        batch["x"],
        rng.normal(size=(8, 5)).astype(np.float32),
    )
    highest = np.float32(1.5)

    def loss(params: Any, x: Any) -> Any:
        extra = {RANGES: {"params/kernel": highest}}
        return (model.apply(params, extra, {"x": x}, train=False, key=None)[0] * cotangent).sum()

    rounded_x = rounded(x, highest / np.float32(127))
    rounded_kernel = rounded(kernel, np.abs(kernel).max(0) / np.float32(127))
    value, (grad, grad_x) = jax.value_and_grad(loss, (0, 1))(params, x)
    np.testing.assert_allclose(value, (rounded_x @ rounded_kernel * cotangent).sum(), rtol=1e-4)
    np.testing.assert_allclose(grad["kernel"], rounded_x.T @ cotangent, rtol=1e-4, atol=1e-5)
    want = np.where(np.abs(x) > highest, 0, cotangent @ rounded_kernel.T)
    assert (want == 0).any()
    np.testing.assert_allclose(grad_x, want, rtol=1e-4, atol=1e-5)


def test_a_range_is_the_moving_average_of_the_largest_magnitudes() -> None:
    model, params, _ = dense(np.random.default_rng(0))
    extra, largest, want = {RANGES: {"params/kernel": jnp.float32(0)}}, [2.0, 4.0, 1.0], None
    for value in largest:
        batch = {"x": np.linspace(-value, value / 2, 32, dtype=np.float32).reshape(2, 16)}
        _, extra = model.apply(params, extra, batch, train=True, key=jax.random.key(0))
        want = value if want is None else 0.99 * want + 0.01 * value
        assert extra[RANGES]["params/kernel"] == pytest.approx(want, rel=1e-6)
        _, same = model.apply(params, extra, batch, train=False, key=None)
        assert same == extra
    unseen = {RANGES: {"params/kernel": jnp.float32(0)}}
    outputs, _ = model.apply(params, unseen, batch, train=False, key=None)
    kernel = np.asarray(params["kernel"])
    want = batch["x"] @ rounded(kernel, np.abs(kernel).max(0) / 127)
    np.testing.assert_allclose(outputs, want, rtol=1e-4, atol=1e-5)  # activations are not rounded


class Net(nn.Module):
    """A convolution, a block that may be recomputed, a shared kernel, and a product with its own gradient."""

    remat: bool = False

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(4, (3, 3), name="conv")(image)
        block = nn.remat(nn.Dense) if self.remat else nn.Dense
        x = nn.relu(block(8, name="block")(x.mean((1, 2))))
        shared = nn.Dense(8, name="shared")
        x = shared(shared(x))
        return own_gradient(x, self.param("own", nn.initializers.lecun_normal(), (8, 3)))


@jax.custom_vjp
def own_gradient(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


own_gradient.defvjp(
    lambda x, kernel: (x @ kernel, (x, kernel)), lambda saved, g: (jnp.ones_like(saved[0]), saved[1] * 0 + 7)
)


def test_remat_shared_weights_and_own_gradients() -> None:
    batch = {"image": jax.random.normal(jax.random.key(1), (4, 8, 8, 2))}
    results = []
    for remat in (False, True):
        model = fake_quantize(Net(remat))
        params, extra = model.init(jax.random.key(0), batch)
        names = ("conv/kernel", "block/kernel", "shared/kernel", "shared/kernel#2")
        assert list(extra[RANGES]) == [f"params/{name}" for name in names]

        def loss(params: Any, model: Any = model, extra: Any = extra) -> Any:
            outputs, updated = model.apply(params, extra, batch, train=True, key=jax.random.key(2))
            return (outputs**2).sum(), updated

        results.append(jax.jit(jax.grad(loss, has_aux=True))(params))
    grads, updated = results[0]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), *results)
    np.testing.assert_array_equal(grads["own"], np.full((8, 3), 7))
    assert all(x > 0 for x in updated[RANGES].values())
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads))


def trained(experiment: Experiment, mesh: Mesh, steps: int = 5) -> Trained:
    """Return the experiment after some updates."""
    program = assemble(experiment, mesh)
    state = program.init()
    for step in range(steps):
        state, _ = program.train_step(state, program.train.batch(step), program.key)
    program.close()
    count = len(experiment.test)
    about = {"name": "tiny", "step": steps, "metrics": {}, "config": {}}
    return Trained.of(experiment, jax.device_get(state), experiment.test.gather(np.arange(count)), about)


def relative(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


CNN, WITNESS = (
    EXPERIMENT.model,
    "tests/compress/test_fake_quantize.py::test_an_int8_export_computes_what_evaluations_compute",
)
MLP = models.MLP(widths=(16,), classes=4)


@pytest.mark.parametrize(
    ("model", "precision"),
    [
        (MLP, "float32"),
        pytest.param(CNN, "float32", marks=pytest.mark.full("[model0-float32]")),
        pytest.param(CNN, "bfloat16", marks=pytest.mark.full("[model0-float32]")),
    ],
)
def test_an_int8_export_computes_what_evaluations_compute(model: Any, precision: Any, mesh1: Mesh) -> None:
    """With averaged weights and BatchNorm; without the rounding the outputs are far from these."""
    before = trained(dataclasses.replace(INT8, model=model, precision=precision), mesh1)
    after = quantized.quantize_trained(before, examples=64)
    expected = model_outputs(before)["logits"]
    assert relative(model_outputs(after)["logits"], expected) < (1e-5 if precision == "float32" else 2e-2)
    kernels = [x for name, x in after.serving.weights.items() if name.endswith("/kernel")]
    assert len(kernels) == 2 and all(x.dtype == np.int8 for x in kernels)
    exact = dataclasses.replace(before.experiment, compress=None)
    unrounded = Trained.of(exact, before.state, before.examples, before.about)
    assert relative(model_outputs(unrounded)["logits"], expected) > 1e-3


@pytest.mark.full(WITNESS)
def test_onnx_computes_what_evaluations_compute(mesh1: Mesh, tmp_path: Path) -> None:
    """QuantizeLinear has the trained scales; a residual sum reads the exact activation."""
    pytest.importorskip("onnxruntime")
    from jaxtrain.artifact.engines import OnnxModel

    model = models.CNN(widths=(8, 8), convs=2, classes=4)  # with residual blocks
    before = trained(dataclasses.replace(INT8, model=model), mesh1)
    write.write("onnx", tmp_path / "int8.onnx", before, calibrate=64)
    inputs = {name: np.asarray(before.examples[name]) for name in before.serving.inputs}
    found = OnnxModel(tmp_path / "int8.onnx")(inputs)["logits"]
    expected = model_outputs(before)["logits"]
    assert np.sqrt(np.mean((found - expected) ** 2)) < 1e-3 * np.abs(expected).max()
    write.write("jaxtrain", tmp_path / "float.jaxtrain", before)  # and as floats that are rounded


@pytest.mark.full(WITNESS)
@pytest.mark.parametrize("mesh", ["data=8", "fsdp=4,model=2"])
def test_ranges_do_not_depend_on_the_mesh(mesh: str, mesh1: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "SMALLEST", 32)
    experiment = dataclasses.replace(INT8, model=MLP, augment=(), post_update=())
    made = sharding.make_mesh(jax.devices(), sharding.parse_mesh(mesh, 8))
    one, other = (trained(experiment, m, 2).state.extra[RANGES] for m in (mesh1, made))
    assert one.keys() == other.keys() and all(x > 0 for x in one.values())
    for name, x in one.items():
        np.testing.assert_allclose(other[name], x, rtol=1e-4)


@pytest.mark.full(WITNESS)
def test_a_run_is_fine_tuned_resumed_and_combined(tmp_path: Path, mesh1: Mesh) -> None:
    """A run in float32, then from it one in int8 that is pruned and distilled, then one from that."""
    console, teacher = monitor.make_console(), tmp_path / "tiny"
    jaxtrain.fit(EXPERIMENT, folder=teacher, mesh=mesh1, console=console, name="tiny")
    file = Path(__file__).parent.parent / "tiny.py"
    loss = Distil(EXPERIMENT.loss, teacher=str(teacher), teacher_experiment=str(file))
    stages = (Prune(sparsity=0.5, start=0, end=0, rounds=1), optim.EMA(0.9))
    student = dataclasses.replace(INT8, loss=loss, post_update=stages, accumulate=2, remat="dots_saveable")
    result = jaxtrain.fit(student, folder=tmp_path / "int8", mesh=mesh1, init_from=teacher)
    assert result["sparsity"]["total"] == pytest.approx(0.5, abs=0.01)
    arrays = checkpoint.arrays(tmp_path / "int8")
    highest = arrays[f"extra/{RANGES}/params/head/kernel"]
    assert highest > 0
    again = dataclasses.replace(INT8, optimizer=optim.SGD(lr=1e-6), epochs=0.05)
    jaxtrain.fit(again, folder=tmp_path / "again", mesh=mesh1, init_from=tmp_path / "int8")
    later = checkpoint.arrays(tmp_path / "again")[f"extra/{RANGES}/params/head/kernel"]
    assert 0.95 * highest < later < 1.05 * highest
    with pytest.raises(InputError, match="compress"):  # another setting is another run
        jaxtrain.fit(dataclasses.replace(again, compress=None), folder=tmp_path / "again", mesh=mesh1)


@pytest.mark.parametrize("zeros", ["a channel", "everything", "the input"])
def test_zeros_stay_zeros(zeros: str) -> None:
    """A step of the smallest float divided by 127 would be flushed to 0 in a compiled program: 0 / 0."""
    model, params, batch = dense(np.random.default_rng(0))
    if zeros == "the input":
        batch = {"x": np.zeros_like(batch["x"])}
    else:
        params = {
            "kernel": params["kernel"].at[:, slice(2, 3) if zeros == "a channel" else slice(None)].set(0)
        }

    @jax.jit
    def step(params: Any, extra: Any) -> Any:
        def loss(params: Any) -> Any:
            outputs, new = model.apply(params, extra, batch, train=True, key=None)
            return (outputs**2).sum(), (outputs, new)

        return jax.grad(loss, has_aux=True)(params)

    extra: Any = {RANGES: {"params/kernel": np.float32(0)}}
    for _ in range(2):
        grad, (outputs, extra) = step(params, extra)
        assert np.isfinite(outputs).all() and np.isfinite(grad["kernel"]).all()
    assert (np.asarray(outputs)[:, 2] == 0).all()
    if zeros == "the input":
        assert extra[RANGES]["params/kernel"] == 0
        return
    int8 = quantize(
        lambda params, x: model.apply(params, extra, {"x": x}, train=False, key=None)[0], params, [batch["x"]]
    )
    np.testing.assert_allclose(jax.jit(int8.apply)(int8.weights, batch["x"]), outputs, atol=0.1)


def test_a_layer_without_input_stays_float_as_in_evaluations() -> None:
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(6, 6)), jnp.float32) for name in ("first", "late")}

    def apply(params: Any, x: Any) -> Any:
        with jax.named_scope("net"):
            return (x @ params["first"]) @ params["late"]

    x = rng.normal(size=(4, 6)).astype(np.float32)
    all_ranges = {"first": 4.0, "late": 20.0}
    both = quantize(apply, params, [x], all_ranges)
    assert sum("input_scale" in name for name in both.weights) == 2
    one = quantize(apply, params, [x], {**all_ranges, "late": 0.0})
    assert sum("input_scale" in name for name in one.weights) == 1
    np.testing.assert_allclose(one.apply(one.weights, x), apply(params, x), atol=0.3)


def test_float16_rounds_too() -> None:
    model = fake_quantize(compute_in(models.MLP(widths=(8,), classes=3), "float16"))
    batch = {"image": jax.random.normal(jax.random.key(1), (4, 6))}
    params, extra = model.init(jax.random.key(0), batch)
    outputs, extra = model.apply(params, extra, batch, train=True, key=jax.random.key(1))
    assert outputs.dtype == jnp.float32 and np.isfinite(outputs).all()
    assert all(x.dtype == jnp.float32 and x > 0 for x in extra[RANGES].values())


def test_the_name_is_a_setting_that_is_recorded_only_where_it_is_used() -> None:
    assert "compress" not in config_text(EXPERIMENT) and config_text(INT8)["compress"] == "'int8'"
    assert config_hash(EXPERIMENT) != config_hash(INT8)
    assert override(EXPERIMENT, ["compress=int8"]).compress == "int8"
    assert override(INT8, ["compress=none"]).compress is None


def test_the_hash_of_an_experiment_from_before_the_field_is_the_same() -> None:
    from jaxtrain.experiment import find

    assert config_hash(find("digits_cnn").load()[0]) == "f0b72fe8"


def state_of(name: str) -> Model:
    return Model(lambda key, batch: ({"kernel": jnp.ones((16, 2))}, {name: jnp.zeros(())}), linear)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: dataclasses.replace(EXPERIMENT, compress="int4"), "compress is 'int4': it must be int8, or"),
        (lambda: override(EXPERIMENT, ["compress=int4"]), "compress=int4: expected 'int8' or None"),
        (lambda: fake_quantize(state_of(RANGES)).init(None, {"x": jnp.ones((2, 16))}), "rename it"),
        (
            lambda: fake_quantize((lambda key, batch: ({}, {}), lambda p, e, b, **_: (b["x"], e))).init(
                None, {"x": jnp.ones((2, 16))}
            ),
            "no dense layer or convolution",
        ),
    ],
)
def test_refusals(act: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_an_export_needs_ranges(mesh1: Mesh) -> None:
    with pytest.raises(InputError, match="all 0: train at least one update"):
        quantized.quantize_trained(trained(INT8, mesh1, steps=0), examples=8)
