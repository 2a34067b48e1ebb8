"""jaxtrain.models.resnet and .vit: parameters, values, modes, every field, bfloat16, and what they refuse."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.core.errors import InputError
from jaxtrain.models.adapter import as_model
from jaxtrain.models.resnet import ResNet
from jaxtrain.models.vit import ViT, sincos

pytestmark = pytest.mark.full("tests/models/test_models.py")

RNG = np.random.default_rng(0)
KEY = jax.random.key(1)
QUICK = jax.random.key(1, impl="unsafe_rbg")  # initialisations compile in half the time
RESNET = ResNet(stages=(1, 1), block="basic", stem="cifar", width=2, classes=3)
VIT = ViT(patch=2, width=8, depth=1, heads=2, mlp=2, classes=3)
BASES = {ResNet: RESNET, ViT: VIT}
EACH = pytest.mark.parametrize("module", [RESNET, VIT], ids=["ResNet", "ViT"])


def images(n: int = 4, side: int = 4, channels: int = 3) -> np.ndarray:
    return RNG.normal(size=(n, side, side, channels)).astype(np.float32)


def shapes(module: Any, shape: tuple[int, ...]) -> Any:
    return jax.eval_shape(as_model(module).init, KEY, {"image": jnp.zeros(shape)})


def random_state(module: Any, batch: Any) -> Any:
    """Return random params and statistics of the model's shapes, without compiling an initialisation."""
    rng = np.random.default_rng(1)
    params, extra = jax.eval_shape(as_model(module).init, KEY, batch)
    filled = jax.tree.map(lambda x: (0.5 * rng.normal(size=x.shape)).astype(x.dtype), params)
    return filled, jax.tree.map(lambda x: rng.uniform(0.5, 2, x.shape).astype(x.dtype), extra)


@functools.partial(jax.jit, static_argnames=("module", "train"))
def run_model(module: Any, params: Any, extra: Any, image: Any, train: bool = False, key: Any = None) -> Any:
    return as_model(module).apply(params, extra, {"image": image}, train=train, key=key)


def size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


# --- sizes


@pytest.mark.parametrize(
    ("module", "side", "count"),
    [
        (ResNet(), 224, 25_557_032),
        (ResNet(stages=(2, 2, 2, 2), block="basic"), 224, 11_689_512),
        (ResNet(stages=(2, 2, 2, 2), block="basic", stem="cifar", classes=10), 32, 11_173_962),
    ],
    ids=["ResNet-50", "ResNet-18", "ResNet-18 for CIFAR"],
)
def test_resnets_have_the_published_number_of_parameters(module: Any, side: int, count: int) -> None:
    assert size(shapes(module, (1, side, side, 3))[0]) == count


@pytest.mark.parametrize("positions", ["sincos", "learned"])
def test_vit_s16_has_the_parameters_counted_by_hand(positions: Any) -> None:
    w, hidden, tokens = 384, 4 * 384, 14 * 14
    block = 2 * 2 * w + (w * 3 * w + 3 * w) + (w * w + w) + (w * hidden + hidden) + (hidden * w + w)
    expected = (16 * 16 * 3 * w + w) + 12 * block + 2 * w + (w * 1000 + 1000)
    assert expected == 21_974_632
    expected += tokens * w if positions == "learned" else 0
    assert size(shapes(ViT(positions=positions), (1, 224, 224, 3))[0]) == expected


@EACH
def test_logits_are_float32_one_row_an_image(module: Any) -> None:
    batch = {"image": images(5)}
    params, extra = random_state(module, batch)
    found = jax.eval_shape(
        functools.partial(as_model(module).apply, train=False, key=None), params, extra, batch
    )[0]
    assert found.shape == (5, 3) and found.dtype == jnp.float32


# --- ResNet


def reference(params: Any, stats: Any, x: jax.Array, module: ResNet) -> jax.Array:
    """Compute a ResNet in evaluation mode, layer by layer."""

    def conv(x: jax.Array, name: str, stride: int, where: Any) -> jax.Array:
        kernel = where[name]["kernel"]
        pad = (kernel.shape[0] - 1) // 2
        x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "VALID", dimension_numbers=dims)

    def norm(x: jax.Array, name: str, where: Any, stats: Any) -> jax.Array:
        p, s = where[name], stats[name]
        mean, var, scale, bias = (v[None, None, None] for v in (s["mean"], s["var"], p["scale"], p["bias"]))
        return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias

    large = module.stem == "imagenet"
    x = jax.nn.relu(norm(conv(x, "stem_conv", 2 if large else 1, params), "stem_norm", params, stats))
    if large:
        h, w = x.shape[1:3]
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
        x = jnp.stack([padded[:, i : i + h : 2, j : j + w : 2] for i in range(3) for j in range(3)]).max(0)
    last = 2 if module.block == "bottleneck" else 1
    for stage, blocks in enumerate(module.stages):
        for number in range(blocks):
            p, s = (tree[f"stage{stage}_block{number}"] for tree in (params, stats))
            stride = 2 if stage > 0 and number == 0 else 1
            y = x
            for i in range(last + 1):
                here = i == 1 if module.block == "bottleneck" else i == 0
                y = norm(conv(y, f"conv{i}", stride if here else 1, p), f"norm{i}", p, s)
                y = jax.nn.relu(y) if i < last else y
            if "shortcut_conv" in p:
                x = norm(conv(x, "shortcut_conv", stride, p), "shortcut_norm", p, s)
            x = jax.nn.relu(x + y)
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"][None]


@pytest.mark.parametrize("side", [16, 17])
@pytest.mark.parametrize(("block", "stem"), [("basic", "cifar"), ("bottleneck", "imagenet")])
def test_resnet_equals_a_reference_implementation(block: Any, stem: Any, side: int) -> None:
    module = ResNet(stages=(1, 2), block=block, stem=stem, width=4, classes=3)
    batch = {"image": images(side=side)}
    params, extra = random_state(module, batch)
    found = jax.jit(functools.partial(as_model(module).apply, train=False, key=None))(params, extra, batch)[0]
    expected = jax.jit(functools.partial(reference, module=module))(
        params, extra["batch_stats"], batch["image"]
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_bottlenecks_project_the_shortcut_only_where_the_shape_changes() -> None:
    params, _ = shapes(ResNet(stages=(2, 2), block="bottleneck", width=4), (1, 16, 16, 3))
    assert {name for name, leaves in params.items() if "shortcut_conv" in leaves} == {
        "stage0_block0",
        "stage1_block0",
    }
    params, _ = shapes(RESNET, (1, 16, 16, 3))
    assert [name for name, leaves in params.items() if "shortcut_conv" in leaves] == ["stage1_block0"]


@pytest.fixture(scope="module")
def initial_state() -> Any:
    batch = {"image": images(64) + 2}
    module = ResNet(stages=(1,), block="bottleneck", stem="cifar", width=32, classes=9, bn_momentum=0.75)
    return module, batch, *jax.jit(as_model(module).init)(QUICK, batch)


def test_resnet_starts_with_he_convolutions_and_each_residual_branch_at_zero(initial_state: Any) -> None:
    params = initial_state[2]
    block = params["stage0_block0"]
    assert not block["norm2"]["scale"].any()
    assert all((block[name]["scale"] == 1).all() for name in ("norm0", "norm1", "shortcut_norm"))
    assert not any("bias" in leaves for name, leaves in block.items() if "conv" in name)
    for name in ("conv0", "conv1", "conv2", "shortcut_conv"):
        kernel = np.asarray(block[name]["kernel"])
        fan_out = kernel.shape[0] * kernel.shape[1] * kernel.shape[3]
        assert kernel.std() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1)
        assert np.abs(kernel).max() > 2.5 * kernel.std()  # a normal, not a truncated one
    assert float(params["head"]["kernel"].std()) == pytest.approx(0.01, rel=0.1)


def test_resnets_batch_statistics_move_in_training_only_by_momentum(initial_state: Any) -> None:
    module, batch, params, extra = initial_state
    model = as_model(module)
    moved = jax.jit(functools.partial(model.apply, train=True))(params, extra, batch, key=KEY)[1][
        "batch_stats"
    ]
    still = jax.jit(functools.partial(model.apply, train=False))(params, extra, batch, key=None)[1][
        "batch_stats"
    ]
    jax.tree.map(np.testing.assert_array_equal, still, extra["batch_stats"])
    kernel, dims = params["stem_conv"]["kernel"], ("NHWC", "HWIO", "NHWC")
    conv = jax.lax.conv_general_dilated(batch["image"], kernel, (1, 1), "SAME", dimension_numbers=dims)
    np.testing.assert_allclose(moved["stem_norm"]["mean"], 0.25 * conv.mean((0, 1, 2)), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(moved["stem_norm"]["var"], 0.75 + 0.25 * conv.var((0, 1, 2)), rtol=1e-3)
    for name in ("norm0", "norm1", "norm2", "shortcut_norm"):
        assert moved["stage0_block0"][name]["mean"].any()


# --- ViT


def test_vit_starts_at_zero_logits_and_each_of_q_k_v_at_xavier() -> None:
    batch = {"image": images()}
    module = VIT.clone(width=64)
    params, _ = jax.jit(as_model(module).init)(QUICK, batch)
    assert not params["head"]["kernel"].any() and not params["head"]["bias"].any()
    qkv = np.asarray(params["block0"]["qkv"]["kernel"])
    limit = math.sqrt(6 / (64 + 64))
    assert 0.98 * limit < np.abs(qkv).max() <= limit
    assert not np.allclose(qkv[:, 0], qkv[:, 1])


def test_vit_pools_over_patches_and_ignores_their_order_without_positions() -> None:
    image = images()
    params, extra = random_state(VIT.clone(positions="learned"), {"image": image})
    swapped = image[:, :, [2, 3, 0, 1]]  # columns of patches

    @jax.jit
    def run(params: Any, image: Any) -> Any:
        module = VIT.clone(positions="learned")
        return as_model(module).apply(params, extra, {"image": image}, train=False, key=None)[0]

    assert not np.allclose(run(params, image), run(params, swapped), atol=1e-3)
    params = {**params, "position_table": np.zeros_like(params["position_table"])}
    np.testing.assert_allclose(run(params, image), run(params, swapped), atol=1e-4)
    # Twice the same patches have the same mean, unless one of them were special.
    wide = np.concatenate([image, image], axis=2)
    params = {**params, "position_table": np.zeros((8, 8), np.float32)}
    np.testing.assert_allclose(
        run(params, wide)[0],
        run({**params, "position_table": np.zeros((4, 8), np.float32)}, image)[0],
        atol=1e-4,
    )


def test_sincos_positions_are_those_of_the_formula() -> None:
    table = np.asarray(sincos(3, 5, 12)).reshape(3, 5, 4, 3)
    frequency = [1, 1e-2, 1e-4]
    for row in range(3):
        for column in range(5):
            for i, f in enumerate(frequency):
                expected = [g(axis * f) for axis in (column, row) for g in (math.sin, math.cos)]
                np.testing.assert_allclose(table[row, column, :, i], expected, atol=1e-6)


def test_sincos_vit_accepts_other_image_sizes_and_a_learned_one_refuses_them() -> None:
    small, large = {"image": images(side=4)}, {"image": images(side=6)}
    params, extra = random_state(VIT, small)
    apply = functools.partial(as_model(VIT).apply, train=False, key=None)
    assert jax.eval_shape(apply, params, extra, large)[0].shape == (4, 3)
    learned = as_model(VIT.clone(positions="learned"))
    params, extra = random_state(VIT.clone(positions="learned"), small)
    with pytest.raises(InputError, match=r"image \(4, 6, 6, 3\)\) does not fit the parameters of ViT"):
        learned.apply(params, extra, large, train=False, key=None)


def test_vits_dropout_acts_in_training_only_and_by_its_key_only() -> None:
    params, extra = random_state(VIT, {"image": FIXED})

    def run(dropout: float, train: bool, key: Any) -> Any:
        return run_model(VIT.clone(dropout=dropout), params, extra, FIXED, train=train, key=key)[0]

    drawn, plain, evaluated = run(0.5, True, KEY), run(0.0, True, KEY), run(0.5, False, KEY)
    np.testing.assert_array_equal(drawn, run(0.5, True, KEY))
    assert not np.allclose(drawn, run(0.5, True, jax.random.key(2)))
    assert not np.allclose(drawn, plain)
    np.testing.assert_array_equal(evaluated, run(0.5, False, jax.random.key(2)))
    np.testing.assert_allclose(evaluated, plain, rtol=1e-5, atol=1e-5)


# --- both

CASES: dict[type, dict[str, Any]] = {
    ResNet: {
        "stages": (1, 2),
        "block": "bottleneck",
        "stem": "imagenet",
        "width": 3,
        "classes": 5,
        "bn_momentum": 0.5,
        "bn_groups": 2,
    },
    ViT: {
        "patch": 4,
        "width": 16,
        "depth": 2,
        "heads": 4,
        "mlp": 3,
        "classes": 5,
        "dropout": 0.5,
        "positions": "learned",
    },
}
OTHERS = ("parent", "name", "attention")  # the last changes no result: test_attention.py
FIELDS = [(cls, f.name) for cls in CASES for f in dataclasses.fields(cls) if f.name not in OTHERS]
FIXED = images(4, 8)


@functools.cache
def effect(module: Any) -> Any:
    params, extra = random_state(module, {"image": FIXED})
    found = run_model(module, params, extra, FIXED, train=True, key=KEY)
    return jax.tree.map(lambda x: np.round(x, 5).tolist(), found)


@pytest.mark.parametrize(("cls", "field"), FIELDS)
def test_every_field_of_a_model_changes_something(cls: type, field: str) -> None:
    base = BASES[cls]
    other = base.clone(**{field: CASES[cls][field]})
    # Parameters of another shape are a change that needs no compiling.
    assert shapes(other, FIXED.shape) != shapes(base, FIXED.shape) or effect(other) != effect(base)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("module", "products", "scores"),
    [
        (RESNET, 7, 0),
        (ResNet(stages=(1, 1), width=2, classes=3), 10, 0),
        (VIT, 8, 1),
        (VIT.clone(positions="learned", dropout=0.5), 8, 1),
    ],
    ids=["ResNet", "bottleneck", "ViT", "learned"],
)
def test_bfloat16_stays_bfloat16(module: Any, products: int, scores: int, train: bool) -> None:
    params, extra = shapes(module, (4, 8, 8, 3))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    batch = {"image": jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.bfloat16)}
    apply = functools.partial(as_model(module).apply, train=train)
    jaxpr, (found, after) = jax.make_jaxpr(apply, return_shape=True)(params, extra, batch, key=KEY)
    assert found.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(after))
    types = re.findall(r":(\w+)\[[\d,]*\] = (?:conv_general_dilated|dot_general)", str(jaxpr))
    assert len(types) == products
    assert [t for t in types if t != "bf16"] == ["f32"] * scores  # attention's scores alone


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (RESNET, (4, 3, 8, 8), r"NCHW.*ResNet takes"),
        (ResNet(), (4, 31, 40, 3), r"too small: .* ResNet needs at least 32 pixels"),
        (ResNet(stages=(1, 1), stem="cifar"), (4, 1, 9, 3), r"at least 2 pixels"),
        (ResNet(stages=()), (4, 64, 64, 3), r"ResNet\(stages=\(\), width=64\): all must be at least 1"),
        (ResNet(stages=(1, 0)), (4, 64, 64, 3), r"stages=\(1, 0\)"),
        (ResNet(width=0), (4, 64, 64, 3), "width=0"),
        (VIT, (4, 3, 8, 8), r"NCHW.*ViT takes"),
        (VIT, (8, 8, 3), r"image has shape \(8, 8, 3\): ViT takes"),
        (VIT, (4, 8, 7, 3), r"\(4, 8, 7, 3\): height and width must be multiples of ViT's patch of 2 pixels"),
        (
            ViT(),
            (4, 8, 16, 3),
            r"multiples of ViT's patch of 16 pixels; resize the images or set model\.patch",
        ),
        (VIT.clone(heads=3), (4, 8, 8, 3), r"ViT\(width=8, heads=3\): heads must divide width"),
        (VIT.clone(heads=0), (4, 8, 8, 3), r"ViT\(width=8, heads=0\)"),
        (VIT.clone(width=6), (4, 8, 8, 3), r"ViT\(width=6\): sincos .* multiple of 4.*learned"),
        (VIT.clone(patch=0), (4, 8, 8, 3), r"ViT\(patch=0, depth=1, mlp=2\): all must be at least 1"),
        (VIT.clone(depth=0), (4, 8, 8, 3), "depth=0"),
        (VIT.clone(mlp=0), (4, 8, 8, 3), "mlp=0"),
    ],
)
def test_images_that_do_not_fit_are_refused_in_one_line(module: Any, shape: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        shapes(module, shape)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("module", "side"),
    [(RESNET, 2), (ResNet(width=2), 32), (VIT, 2), (VIT.clone(width=6, positions="learned"), 4)],
)
def test_smallest_image_that_fits_is_accepted(module: Any, side: int) -> None:
    assert shapes(module, (4, side, side, 1))
