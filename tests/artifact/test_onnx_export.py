"""What an ONNX export promises besides right values: names, folding, precision, and what it refuses."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from jaxtrain import models
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.models.plain_operators import plain_operators

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from jaxtrain.artifact.onnx import check, to_onnx  # noqa: E402

RNG = np.random.default_rng(0)
IMAGE = {"image": jax.ShapeDtypeStruct((8, 8, 3), jnp.float32)}
LINE = {"x": jax.ShapeDtypeStruct((4,), jnp.float32)}
IMAGES = {"image": RNG.normal(size=(17, 8, 8, 3)).astype(np.float32)}
LINES = {"x": RNG.normal(size=(17, 4)).astype(np.float32)}


def pure(module: Any, precision: Any = "float32") -> tuple[Any, Any]:
    """Return a module as a pure function, and weights."""
    model = models.compute_in(module, precision)
    params, extra = jax.jit(models.as_model(module).init)(jax.random.key(0), IMAGES)

    def apply(weights: Any, inputs: Any) -> dict[str, Any]:
        outputs, _ = model.apply(weights["params"], weights["extra"], inputs, train=False, key=None)
        return {"logits": outputs}

    return apply, {"params": params, "extra": extra}


def of(function: Any) -> Any:
    """Return a function of ``x`` as a function of weights and inputs."""
    return lambda weights, inputs: {"y": function(inputs["x"])}


def kinds(model: Any) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_names_are_those_of_inputs_outputs_weights_and_layers() -> None:
    model = to_onnx(*pure(models.MLP(widths=(5,), classes=2)), IMAGE)
    assert [i.name for i in model.graph.input] == ["image"]
    assert [o.name for o in model.graph.output] == ["logits"]
    names = {tensor.name for tensor in model.graph.initializer}
    assert {"params/dense0/kernel", "params/dense0/bias", "params/head/kernel", "params/head/bias"} <= names
    (first, _) = (node.name for node in model.graph.node if node.op_type == "MatMul")
    assert first.startswith("MLP/dense0/")
    assert [entry.version for entry in model.opset_import] == [17]


def test_names_of_inputs_that_tensors_would_have() -> None:
    """An input may have the name that a node's output, or a weight, would get."""

    def apply(weights: Any, inputs: Any) -> dict[str, Any]:
        return {"add_2": inputs["add_1"] + weights["mul_1"], "kernel": inputs["add_1"] * 2}

    weights = {"mul_1": np.ones((1, 4), np.float32)}
    model = to_onnx(apply, weights, {"add_1": LINE["x"]})
    check(model, {"add_1": LINES["x"]}, apply(weights, {"add_1": LINES["x"]}))


def test_batch_norm_and_bias_are_part_of_the_convolution() -> None:
    apply, weights = pure(models.CNN(widths=(4, 4), classes=3))
    model = to_onnx(apply, weights, IMAGE)
    assert not {"Mul", "Sub"} & set(kinds(model))
    assert kinds(model).count("Conv") == 4
    assert all(len(node.input) == 3 for node in model.graph.node if node.op_type == "Conv")


@pytest.mark.parametrize("sign", [1, -1])
def test_only_positive_factors_move_through_a_max_pool(sign: int) -> None:
    kernel = RNG.normal(size=(3, 3, 3, 4)).astype(np.float32)
    scale = sign * np.array([[[[1.0, 2.0, 0.5, 3.0]]]], np.float32)

    def apply(weights: Any, inputs: Any) -> dict[str, Any]:
        y = lax.conv_general_dilated(
            inputs["image"], weights["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return {"y": models.max_pool(y) * scale + 1}

    model = to_onnx(apply, {"kernel": kernel}, IMAGE)
    check(model, IMAGES, jax.jit(apply)({"kernel": kernel}, IMAGES))
    assert kinds(model).count("Mul") == (0 if sign > 0 else 1)


@pytest.mark.full("tests/artifact/test_onnx_export.py::test_batch_norm_and_bias_are_part_of_the_convolution")
def test_a_shared_kernel_is_folded_once() -> None:
    net = models.ConvNet(widths=(4,), classes=2)
    apply, weights = pure(net)

    def twice(weights: Any, inputs: Any) -> dict[str, Any]:
        mirror = {"image": inputs["image"][:, :, ::-1]}
        return {"logits": apply(weights, inputs)["logits"] + apply(weights, mirror)["logits"]}

    model = to_onnx(twice, weights, IMAGE)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 2
    assert len({tuple(node.input[1:]) for node in convolutions}) == 1
    assert sum(tensor.dims[:1] == [4] and len(tensor.dims) == 4 for tensor in model.graph.initializer) == 1


@pytest.mark.full("[float16]")
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_computed_in_float32(precision: str) -> None:
    module = models.CNN(widths=(4,), convs=1, classes=3)
    apply, weights = pure(module, precision)
    model = to_onnx(apply, weights, IMAGE)
    exact, _ = pure(module)
    assert check(model, IMAGES, jax.jit(exact)(weights, IMAGES), tolerance=1e-5) <= 1e-5
    assert 1e-5 < check(model, IMAGES, jax.jit(apply)(weights, IMAGES)) < 3e-2
    types = {tensor.data_type for tensor in model.graph.initializer}
    assert types <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}


def test_half_precision_inputs_and_outputs_are_float32() -> None:
    x = {"x": jax.ShapeDtypeStruct((4,), jnp.bfloat16)}
    model = to_onnx(of(lambda x: x * 2), {}, x)
    for tensor in (*model.graph.input, *model.graph.output):
        assert tensor.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_what_depends_on_no_input_is_computed_while_exporting() -> None:
    def apply(weights: Any, inputs: Any) -> dict[str, Any]:
        noise = jax.random.normal(jax.random.key(3), (4,))
        return {"y": inputs["x"] + (jnp.linalg.cholesky(weights["w"]) @ noise)[None]}

    weights = {"w": np.eye(4, dtype=np.float32) * 4}
    model = to_onnx(apply, weights, LINE)
    assert kinds(model) == ["Add", "Identity"]
    check(model, LINES, apply(weights, LINES))


def test_an_equation_that_no_output_needs_is_left_out() -> None:
    def apply(weights: Any, inputs: Any) -> dict[str, Any]:
        jnp.fft.fft(inputs["x"])
        return {"y": inputs["x"] + 1}

    assert kinds(to_onnx(apply, {}, LINE)) == ["Add", "Identity"]


@pytest.mark.full("tests/artifact/test_onnx_export.py::test_batch_norm_and_bias_are_part_of_the_convolution")
def test_plain_operators_compute_the_same() -> None:
    apply, weights = pure(models.ConvNet(widths=(4, 4), classes=2))
    usual = jax.make_jaxpr(apply)(weights, IMAGES)
    with plain_operators():
        plain = jax.make_jaxpr(apply)(weights, IMAGES)
    assert "reduce_window_max" not in str(usual)
    assert str(plain).count("reduce_window_max[") == 2
    assert str(plain).count("conv_general_dilated[") == 2
    want = jax.jit(apply)(weights, IMAGES)["logits"]
    with plain_operators():
        got = jax.jit(apply)(weights, IMAGES)["logits"]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


class Whitened(nn.Module):
    """A net with a layer that ONNX has no operator for."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(4, name="first")(x)
        with jax.named_scope("whiten"):
            factor = jnp.linalg.cholesky(x[:, :, None] * x[:, None] + jnp.eye(4)[None])
        return factor.sum(-1)


def refusal(apply: Any, weights: Any, inputs: Any) -> str:
    with pytest.raises(InputError) as error:
        to_onnx(apply, weights, inputs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_operator_without_equivalent_names_its_layer() -> None:
    weights = jax.jit(Whitened().init)(jax.random.key(0), LINES["x"])
    message = refusal(lambda w, i: {"y": Whitened().apply(w, i["x"])}, weights, LINE)
    assert re.match(r"ONNX export: layer \S*Whitened/whiten\S* uses cholesky, ", message)


REFUSED = {
    "random": (lambda x: x + jax.random.normal(jax.random.key(0), x.shape), "random_bits"),
    "bits": (lambda x: x.astype(jnp.int32) ^ 3, "bitwise"),
    "complex": (lambda x: jnp.abs(jnp.fft.fft(x)), "complex64"),
    "long_sort": (lambda x: jnp.sort(jnp.tile(x, (1, 1000)), 1), "4000"),
    "sorts_batch": (lambda x: jnp.sort(x, 0), "the batch"),
    "scans_batch": (lambda x: lax.scan(lambda c, r: (c + r, c), x[0], x)[1], "the batch"),
    "scatter_add": (lambda x: x.at[:, jnp.array([0, 0])].add(1), "scatter"),
    "outside": (lambda x: x.at[:, x[0, 0].astype(jnp.int32)].set(1), "outside"),
    "no_batch": (lambda x: x.sum(), "first axis must be the batch"),
    "wrong_batch": (lambda x: jnp.concatenate([x, x]), "first axis must be the batch"),
    "batch_size": (lambda x: x if x.shape[0] > 3 else -x, "batch size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(name: str) -> None:
    function, words = REFUSED[name]
    assert words in refusal(of(function), {}, LINE)


def test_a_function_of_another_form_is_refused() -> None:
    assert "no inputs" in refusal(of(lambda x: x), {}, {})
    assert "dict" in refusal(lambda w, i: i["x"], {}, LINE)
    assert "dict" in refusal(lambda w, i: {"y": {"z": i["x"]}}, {}, LINE)
    assert "rename" in refusal(lambda w, i: {"x": i["x"]}, {}, LINE)
    large = {"w": np.broadcast_to(np.zeros((), np.float32), (2**20, 2**10))}
    assert "2 GiB" in refusal(lambda w, i: {"y": i["x"]}, large, LINE)


def test_check_finds_wrong_values_and_invalid_models() -> None:
    model = to_onnx(of(lambda x: x * 2), {}, LINE)
    assert check(model, LINES, {"y": LINES["x"] * 2}) == 0
    with pytest.raises(RunError, match=r"'y' differs from JAX by 3\.3e-01 at batch 1"):
        check(model, LINES, {"y": LINES["x"] * 3})
    with pytest.raises(RunError, match=r"differs from JAX by inf"):
        check(model, LINES, {"y": np.where(LINES["x"] > 9, np.nan, LINES["x"] * 2)[:, :3]})
    with pytest.raises(RunError, match="differs"):
        check(model, LINES, {"y": np.where(LINES["x"] > 0, np.nan, LINES["x"] * 2)})
    model.graph.node[0].op_type = "Mule"
    with pytest.raises(RunError, match="not valid"):
        check(model, LINES, {"y": LINES["x"] * 2})


def test_outputs_that_depend_on_other_rows_are_found() -> None:
    model = to_onnx(of(lambda x: x - x.mean(0, keepdims=True)), {}, LINE)
    with pytest.raises(RunError, match="at batch 1"):
        check(model, LINES, {"y": LINES["x"] - LINES["x"].mean(0)})


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_one_line_with_the_command(package: str, monkeypatch: Any) -> None:
    model = to_onnx(of(lambda x: x), {}, LINE)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(InputError, match=rf"the package {package}, .*pip install 'jaxtrain\[onnx\]'"):
        if package == "onnx":
            to_onnx(of(lambda x: x), {}, LINE)
        check(model, LINES, {"y": LINES["x"]})
