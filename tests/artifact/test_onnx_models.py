"""Every shipped family as an ONNX model: ONNX Runtime computes what JAX computes, at any batch size."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jaxtrain import models

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from jaxtrain.artifact.onnx import check, to_onnx  # noqa: E402

ROWS = 17
TENSORRT = set(Path(__file__).with_name("tensorrt_operators.txt").read_text().splitlines()[1:])
HERE = "tests/artifact/test_onnx_models.py"


class Family(NamedTuple):
    """A model, the inputs of an example (integers below a limit, or normal), and counts of operators."""

    module: Any
    inputs: dict[str, tuple[tuple[int, ...], int | None]]
    counts: dict[str, int] = {}  # noqa: RUF012


def image(side: int, channels: int = 3) -> dict[str, tuple[tuple[int, ...], int | None]]:
    return {"image": ((side, side, channels), None)}


TOKENS = {"tokens": ((12,), 20)}
AIRBENCH = models.Airbench(widths=(8, 16), classes=5, whiten=8)
CONVNET = {"Conv": 2, "MaxPool": 2}
QUICK = {
    "cifar_small_cnn": Family(
        models.ConvNet(widths=(8, 16), kernel=3), image(16), CONVNET | {"Relu": 2, "Transpose": 2, "Add": 1}
    ),
    "cnn_batch_norm": Family(
        models.CNN(widths=(8, 16), convs=2, classes=4),
        image(8),
        {"Conv": 4, "MaxPool": 2, "Add": 3, "Mul": 0},
    ),
    "gpt_rotary": Family(models.GPT(vocab=20, context=16, width=16, depth=1, heads=2), TOKENS, {"Conv": 0}),
    "lstm": Family(
        models.LSTMClassifier(vocab=20, width=8, embedding=4, classes=3),
        TOKENS | {"length": ((), 13)},
        {"Loop": 1},
    ),
}
FULL = {
    "mlp": Family(models.MLP(widths=(8, 8), classes=3), {"image": ((5, 5, 1), None)}, {"Relu": 2}),
    "lenet": Family(
        models.ConvNet(widths=(6, 16), kernel=5, padding="VALID", hidden=(24, 12)), image(32), CONVNET
    ),
    "mnist_keras_cnn": Family(
        models.ConvNet(widths=(8, 16), kernel=3, padding="VALID", hidden=(16,)), image(28, 1), CONVNET
    ),
    "cnn_gelu": Family(
        models.CNN(widths=(8,), convs=2, classes=4, batch_norm=False, activation="gelu"),
        image(8),
        {"Conv": 2, "MaxPool": 1},
    ),
    "resnet18": Family(
        models.ResNet(stages=(2, 2, 2, 2), block="basic", stem="cifar", width=8, classes=4),
        image(16),
        {"Conv": 20, "MaxPool": 0, "Mul": 0, "Sub": 0},
    ),
    "resnet50": Family(
        models.ResNet(width=8, classes=4), image(64), {"Conv": 53, "MaxPool": 1, "Mul": 0, "Sub": 0}
    ),
    "airbench": Family(AIRBENCH, image(16), {"Conv": 5, "MaxPool": 3}),
    "airbench_views": Family(models.TestTimeViews(AIRBENCH), image(16), {"Conv": 30, "MaxPool": 18}),
    "vit_sincos": Family(models.ViT(patch=4, width=16, depth=2, heads=2, classes=4), image(16), {"Conv": 1}),
    "vit_learned": Family(
        models.ViT(patch=4, width=16, depth=1, heads=2, classes=4, positions="learned"),
        image(16),
        {"Conv": 1},
    ),
    "gpt_learned": Family(
        models.GPT(vocab=20, context=16, width=16, depth=2, heads=2, positions="learned"), TOKENS
    ),
    "lstm_bidirectional": Family(
        models.LSTMClassifier(vocab=20, width=8, embedding=4, layers=2, bidirectional=True, pool="last"),
        TOKENS | {"length": ((), 13)},
        {"Loop": 4},
    ),
    "gru": Family(
        models.GRUForecaster(width=8, horizon=4, variables=2), {"series": ((20, 2), None)}, {"Loop": 1}
    ),
    "unet": Family(models.UNet(widths=(8, 16, 16), classes=3), image(16), {"MaxPool": 2, "Mul": 0}),
    "factors": Family(models.Factors(users=20, items=30, width=4), {"user": ((), 20), "item": ((), 30)}),
}


def build(family: Family) -> tuple[Any, Any, dict[str, Any], dict[str, np.ndarray]]:
    """Return a pure function, weights that are not the initial ones, abstract inputs, and 17 examples."""
    rng = np.random.default_rng(0)
    feeds = {
        name: (
            rng.normal(size=(ROWS, *shape)) if limit is None else rng.integers(0, limit, (ROWS, *shape))
        ).astype(np.float32 if limit is None else np.int32)
        for name, (shape, limit) in family.inputs.items()
    }
    model = models.as_model(family.module)
    shapes = jax.eval_shape(model.init, jax.random.key(0), feeds)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        values = rng.normal(size=leaf.shape) * 0.3
        statistics = "var" in jax.tree_util.keystr(path) or "scale" in jax.tree_util.keystr(path)
        return (np.abs(values) + 0.5 if statistics else values).astype(leaf.dtype)

    weights = jax.tree_util.tree_map_with_path(draw, {"params": shapes[0], "extra": shapes[1]})

    def apply(weights: Any, inputs: Any) -> dict[str, Any]:
        outputs, _ = model.apply(weights["params"], weights["extra"], inputs, train=False, key=None)
        return {"outputs": outputs}

    specs = {name: jax.ShapeDtypeStruct(value.shape[1:], value.dtype) for name, value in feeds.items()}
    return apply, weights, specs, feeds


def operators(model: Any) -> Counter[str]:
    """Count the operators, in the bodies of loops and branches too."""
    found: Counter[str] = Counter()
    graphs = [model.graph]
    while graphs:
        for node in graphs.pop().node:
            found[node.op_type] += 1
            graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return found


def check_family(family: Family) -> None:
    apply, weights, specs, feeds = build(family)
    model = to_onnx(apply, weights, specs)
    expected = jax.jit(apply)(weights, feeds)
    assert check(model, feeds, expected) <= 1e-5
    for tensor in (*model.graph.input, *model.graph.output):
        assert tensor.type.tensor_type.shape.dim[0].dim_param == "batch"
    counts = operators(model)
    assert set(counts) <= TENSORRT
    assert {kind: counts[kind] for kind in family.counts} == family.counts


@pytest.mark.full("[lstm]")
@pytest.mark.parametrize("name", QUICK)
def test_a_family_computes_what_jax_computes(name: str) -> None:
    check_family(QUICK[name])


@pytest.mark.full(f"{HERE}::test_a_family_computes_what_jax_computes")
@pytest.mark.parametrize("name", FULL)
def test_every_other_family_computes_what_jax_computes(name: str) -> None:
    check_family(FULL[name])
