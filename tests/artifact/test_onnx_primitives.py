"""Each primitive as ONNX operators: ONNX Runtime computes what JAX computes, many of them in one graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from jaxtrain.artifact.onnx import check, to_onnx  # noqa: E402

TENSORRT = set(Path(__file__).with_name("tensorrt_operators.txt").read_text().splitlines()[1:])
Cases = dict[str, Callable[[dict[str, Any]], Any]]
ROWS = 5
RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(3, 3, 4, 6)).astype(np.float32)
FEEDS = {
    "x": RNG.normal(size=(ROWS, 6, 4)).astype(np.float32),
    "y": RNG.normal(size=(ROWS, 6, 4)).astype(np.float32),
    "unit": RNG.uniform(-0.9, 0.9, (ROWS, 6, 4)).astype(np.float32),
    "small": (RNG.normal(size=(ROWS, 4)) * 1e-4).astype(np.float32),
    "int": RNG.integers(-9, 10, (ROWS, 6)).astype(np.int32),
    "byte": RNG.integers(0, 256, (ROWS, 6)).astype(np.uint8),
    "index": RNG.integers(0, 4, (ROWS, 3)).astype(np.int32),
    "outside": RNG.integers(-9, 10, (ROWS, 3)).astype(np.int32),
    "flag": RNG.integers(0, 2, (ROWS, 6)).astype(bool),
    "image": RNG.normal(size=(ROWS, 9, 8, 4)).astype(np.float32),
    "volume": RNG.normal(size=(ROWS, 5, 6, 4, 2)).astype(np.float32),
}


def run(cases: Cases, batches: tuple[int, ...] = (1, 3, ROWS)) -> Any:
    """Convert the cases as outputs of one function, compare each with JAX, and return the model."""

    def apply(weights: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        outputs = {}
        for name, case in cases.items():
            with jax.named_scope(name):
                outputs[name] = case(inputs)
        return outputs

    specs = {name: jax.ShapeDtypeStruct(value.shape[1:], value.dtype) for name, value in FEEDS.items()}
    model = to_onnx(apply, {}, specs)
    assert operators(model.graph) <= TENSORRT
    check(model, FEEDS, jax.jit(apply)({}, FEEDS), batches=batches)
    return model


def operators(graph: Any) -> set[str]:
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return {node.op_type for node in graph.node}.union(*map(operators, inner))


def unary(name: str, source: str = "x") -> Callable[[dict[str, Any]], Any]:
    return lambda i: getattr(lax, name)(i[source])


def positive(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda i: getattr(lax, name)(jnp.abs(i["x"]) + 0.01)


def test_elementwise_operators_of_floats() -> None:
    anywhere = (
        "abs",
        "ceil",
        "cos",
        "erf",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "logistic",
        "neg",
        "sign",
    )
    more = ("sin", "sinh", "square", "tan", "tanh", "asinh", "atan", "cosh", "cbrt", "is_finite")
    cases: Cases = {name: unary(name) for name in (*anywhere, *more)}
    cases |= {name: positive(name) for name in ("log", "sqrt", "rsqrt", "log1p")}
    cases |= {name: unary(name, "unit") for name in ("acos", "asin", "atanh")}
    cases |= {
        "acosh": lambda i: lax.acosh(jnp.abs(i["x"]) + 1),
        "log1p_small": unary("log1p", "small"),
        "expm1_small": unary("expm1", "small"),
        "atan2": lambda i: lax.atan2(i["x"], i["y"]),
        "atan2_axes": lambda i: lax.atan2(jnp.sign(i["int"]) * 1.0, jnp.sign(i["int"][:, ::-1]) * 1.0 + 0.0),
        "pow": lambda i: jnp.abs(i["x"]) ** i["y"],
        "integer_pow": lambda i: i["x"] ** 3 + i["x"] ** -2 + i["x"] ** 7,
        "rem": lambda i: lax.rem(i["x"], i["y"]),
        "mod": lambda i: jnp.mod(i["x"], 0.7),
        "max_min": lambda i: jnp.maximum(i["x"], i["y"]) - jnp.minimum(i["x"], 0.3),
        "clamp": lambda i: jnp.clip(i["x"], -0.5, 0.5) + lax.clamp(i["unit"] - 1, i["x"], i["unit"] + 1),
        "round_even": lambda i: lax.round(i["int"] * 0.5, lax.RoundingMethod.TO_NEAREST_EVEN),
        "round_away": lambda i: lax.round(i["int"] * 0.5, lax.RoundingMethod.AWAY_FROM_ZERO),
        "compare": lambda i: jnp.stack([i["x"] < i["y"], i["x"] >= 0, i["x"] != i["y"], i["x"] == i["x"]], 1),
        "where": lambda i: jnp.where(i["x"] > 0, i["y"], 2.0),
        "softplus": lambda i: jax.nn.softplus(i["x"] * 20) + jnp.logaddexp(i["x"], i["y"]),
        "gelu": lambda i: jax.nn.gelu(i["x"]) + jax.nn.gelu(i["y"], approximate=False),
        "softmax": lambda i: jax.nn.softmax(i["x"]) + jax.nn.log_softmax(i["y"], 1),
        "logsumexp": lambda i: jax.nn.logsumexp(i["x"], 1),
        "infinite": lambda i: jnp.where(i["x"] > 0, jnp.inf, jnp.where(i["x"] < -1, jnp.nan, i["x"])),
    }
    run(cases)


def test_elementwise_operators_of_integers_and_booleans() -> None:
    run(
        {
            "add_wraps": lambda i: i["byte"] + i["byte"][:, ::-1],
            "mul_wraps": lambda i: i["byte"] * jnp.uint8(7),
            "div": lambda i: lax.div(i["int"], jnp.abs(i["int"][:, ::-1]) + 1),
            "floor_divide": lambda i: i["int"] // 4,
            "rem": lambda i: lax.rem(i["int"], jnp.int32(4)),
            "mod": lambda i: i["int"] % 4,
            "pow": lambda i: i["int"] ** 3,
            "shift": lambda i: (i["int"] << 3) + (i["int"] >> 1) + (i["byte"] >> 2),
            "low_bits": lambda i: (i["int"] & 7) + (i["byte"] & 3),
            "abs_sign": lambda i: abs(i["int"]) * jnp.sign(i["int"]),
            "clip": lambda i: jnp.clip(i["int"], -2, 3) + jnp.minimum(i["byte"], 100),
            "compare": lambda i: (i["byte"] > 100) == (i["int"] <= 3),
            "logic": lambda i: (i["flag"] & ~i["flag"][:, ::-1]) ^ (i["flag"] | (i["int"] > 0)),
            "boolean_max": lambda i: jnp.maximum(i["flag"], i["int"] > 2) != i["flag"],
            "select": lambda i: lax.select_n(i["int"] % 3, i["int"], -i["int"], i["int"] * 2),
            "where_bool": lambda i: jnp.where(i["flag"], i["int"] > 0, i["flag"]),
            "where_byte": lambda i: jnp.where(i["flag"], i["byte"], 3),
            "casts": lambda i: i["byte"].astype(jnp.float32) + i["flag"] + (i["int"] * 0.7).astype(jnp.int32),
            "to_bool": lambda i: i["int"].astype(bool),
            "one_hot": lambda i: jax.nn.one_hot(i["index"], 4),
        }
    )


def test_operators_of_shapes() -> None:
    pad = lambda i, *config: lax.pad(i["x"], jnp.float32(2), config)  # noqa: E731
    run(
        {
            "reshape": lambda i: i["x"].reshape(-1, 4).reshape(-1, 24),
            "transpose": lambda i: i["x"].transpose(0, 2, 1) @ jnp.ones((6, 3)),
            "broadcast": lambda i: jnp.broadcast_to(i["small"][:, None, :, None], (i["x"].shape[0], 2, 4, 3)),
            "zeros": lambda i: jnp.zeros((i["x"].shape[0], 3)),
            "tile": lambda i: jnp.tile(i["small"], (1, 3)),
            "repeat": lambda i: jnp.repeat(i["x"], 2, axis=1),
            "arange": lambda i: jnp.arange(6)[None] + jnp.zeros((i["x"].shape[0], 1), jnp.int32),
            "count_batch": lambda i: jnp.arange(i["x"].shape[0])[:, None] * i["small"][:, :1],
            "concatenate": lambda i: jnp.concatenate([i["x"], i["y"], jnp.ones_like(i["x"])], -1),
            "stack": lambda i: jnp.stack([i["x"], i["y"]], 1),
            "unstack": lambda i: (
                lax.unstack(i["x"], axis=2)[1] if hasattr(lax, "unstack") else i["x"][..., 1]
            ),
            "split": lambda i: jnp.split(i["x"], [1, 4], 1)[1],
            "slice": lambda i: i["x"][:, 1:5:2, ::-1],
            "squeeze": lambda i: i["x"][:, :1].squeeze(1)[..., None, :],
            "roll": lambda i: jnp.roll(i["x"], 2, axis=1),
            "pad": lambda i: pad(i, (0, 0, 0), (1, 2, 0), (0, 3, 0)),
            "pad_crops": lambda i: pad(i, (0, 0, 0), (-1, 2, 0), (0, -2, 0)),
            "pad_inside": lambda i: pad(i, (0, 0, 0), (1, 0, 2), (-1, 0, 1)),
            "pad_reflect": lambda i: jnp.pad(i["x"], ((0, 0), (2, 1), (0, 0)), mode="reflect"),
            "pad_byte": lambda i: jnp.pad(i["byte"], ((0, 0), (1, 1))),
            "tril": lambda i: jnp.tril(i["x"] @ i["y"].transpose(0, 2, 1)),
            "meshgrid": lambda i: i["small"] + jnp.meshgrid(jnp.arange(4.0), jnp.arange(3.0))[0][1:2],
        }
    )


def test_the_batch_size_as_a_number() -> None:
    run(
        {
            "divide": lambda i: i["small"] / i["x"].shape[0],
            "mean": lambda i: i["small"] - i["small"].mean(0, keepdims=True),
            "twice": lambda i: jnp.concatenate([i["small"], jnp.zeros_like(i["small"])])[: i["x"].shape[0]],
        },
        batches=(ROWS,),
    )


def test_reductions_and_sorting() -> None:
    run(
        {
            "sum": lambda i: i["x"].sum((1, 2)) + i["x"].mean(2).sum(-1),
            "max_min": lambda i: i["x"].max(1) - i["x"].min(1, keepdims=True)[:, 0],
            "prod": lambda i: i["x"].prod(1),
            "variance": lambda i: i["x"].var((1, 2)),
            "integer_sum": lambda i: i["int"].sum(1, keepdims=True) + i["byte"].max(1, keepdims=True),
            "byte_sum": lambda i: i["byte"].sum(1),
            "all_any": lambda i: jnp.stack([i["flag"].all(1), i["flag"].any(1)], 1),
            "parity": lambda i: lax.reduce_xor(i["flag"], [1]),
            "argmax": lambda i: jnp.argmax(i["x"], 1) + jnp.argmin(i["y"], 1) * 10,
            "argmax_ties": lambda i: jnp.argmax(i["flag"], 1) + jnp.argmax(i["byte"], 1),
            "cumsum": lambda i: jnp.cumsum(i["x"], 1) + lax.cumsum(i["y"], 1, reverse=True),
            "cumsum_int": lambda i: jnp.cumsum(i["int"], 1),
            "cumprod": lambda i: jnp.cumprod(i["x"], 1),
            "cummax": lambda i: lax.cummax(i["x"], 1) - lax.cummin(i["x"], 2, reverse=True),
            "cummax_int": lambda i: lax.cummax(i["int"], 1, reverse=True),
            "cumlogsumexp": lambda i: lax.cumlogsumexp(i["x"] * 30, 1),
            "sort": lambda i: jnp.sort(i["x"], 1),
            "sort_int": lambda i: jnp.sort(i["int"], 1),
            "argsort_stable": lambda i: jnp.argsort(i["int"], 1),
            "two_keys": lambda i: lax.sort((i["int"] % 3, i["byte"], i["int"]), dimension=1, num_keys=2)[2],
            "top_k": lambda i: lax.top_k(i["x"], 2)[0],
            "top_k_index": lambda i: lax.top_k(i["int"], 3)[1],
            "median": lambda i: jnp.median(i["x"], axis=1),
        }
    )


def test_products_of_matrices() -> None:
    weights = RNG.normal(size=(6, 4, 5)).astype(np.float32)
    volume = RNG.normal(size=(5, 6, 3)).astype(np.float32)
    run(
        {
            "dense": lambda i: i["x"] @ weights[0],
            "left_weights": lambda i: jnp.einsum("cd,btd->bct", weights[:, :, 0], i["x"]),
            "two_contracted": lambda i: jnp.einsum("btd,tdf->bf", i["x"], weights),
            "general_dense": lambda i: jnp.einsum("btd,tdf->btf", i["x"], weights),
            "attention": lambda i: jnp.einsum("btd,bsd->bts", i["x"], i["y"]),
            "heads": lambda i: jnp.einsum("bthd,bshd->bhts", *(i[k].reshape(-1, 6, 2, 2) for k in "xy")),
            "dot": lambda i: jnp.einsum("btd,btd->b", i["x"], i["y"]),
            "outer": lambda i: jnp.einsum("btd,bt->bdt", i["x"], i["y"][..., 0]),
            "contract_volume": lambda i: jnp.einsum("bhwcd,hwf->bcdf", i["volume"], volume),
            "integers": lambda i: i["int"] @ jnp.arange(12, dtype=jnp.int32).reshape(6, 2),
            "gram": lambda i: (i["small"] @ i["small"].T)[:, :1],
        }
    )


def conv(
    i: dict[str, Any],
    kernel: Any = KERNEL,
    padding: Any = "SAME",
    source: str = "image",
    spatial: str = "HW",
    **settings: Any,
) -> Any:
    numbers = f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"
    strides = settings.pop("window_strides", (1,) * len(spatial))
    return lax.conv_general_dilated(
        i[source], kernel, strides, padding, dimension_numbers=numbers, **settings
    )


def test_convolutions() -> None:
    grouped = RNG.normal(size=(3, 3, 2, 6)).astype(np.float32)
    line = RNG.normal(size=(3, 4, 5)).astype(np.float32)
    cube = RNG.normal(size=(2, 3, 2, 2, 4)).astype(np.float32)
    asymmetric = ((2, 0), (0, 1))
    two = {"feature_group_count": 2}
    first = KERNEL.transpose(3, 2, 0, 1)
    wide = {"padding": ((4, 3), (2, 2)), "window_strides": (3, 1)}
    model = run(
        {
            "same": conv,
            "valid_strided": lambda i: conv(i, window_strides=(2, 3), padding="VALID"),
            "dilated": lambda i: conv(i, rhs_dilation=(2, 1), padding=asymmetric),
            "cropped": lambda i: conv(i, padding=((-1, 0), (1, -2))),
            "grouped": lambda i: conv(i, grouped, **two),
            "depthwise": lambda i: conv(i, grouped[:, :, :1, :4], feature_group_count=4),
            "channels_first": lambda i: lax.conv(i["image"].transpose(0, 3, 1, 2), first, (1, 1), "SAME"),
            "transposed": lambda i: lax.conv_transpose(i["image"], KERNEL, (2, 2), "SAME"),
            "transposed_valid": lambda i: lax.conv_transpose(i["image"], KERNEL, (3, 2), "VALID"),
            "transposed_grouped": lambda i: conv(i, grouped, asymmetric, lhs_dilation=(2, 1), **two),
            "transposed_wide": lambda i: conv(i, lhs_dilation=(2, 2), **wide),
            "one_dimension": lambda i: conv(i, line, source="x", spatial="W"),
            "three_dimensions": lambda i: conv(i, cube, source="volume", spatial="DHW"),
            "kernel_from_input": lambda i: conv(i, i["x"][0].reshape(1, 6, 4, 1)),
        }
    )
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("ConvTranspose") == 4
    assert kinds.count("Conv") == 9  # "same" and "channels_first" are one


def test_pooling() -> None:
    def window(i: dict[str, Any], source: str, operation: Any, start: float, *settings: Any) -> Any:
        return lax.reduce_window(i[source], np.float32(start), operation, *settings)

    from flax import linen as nn

    pads = ((0, 0), (1, 1), (0, 2), (0, 0))
    model = run(
        {
            "max": lambda i: nn.max_pool(i["image"], (2, 2), (2, 2)),
            "max_padded": lambda i: nn.max_pool(i["image"], (3, 3), (2, 1), "SAME"),
            "min": lambda i: window(i, "image", lax.min, np.inf, (1, 3, 2, 1), (1, 2, 2, 1), "SAME"),
            "mean": lambda i: nn.avg_pool(i["image"], (3, 3), (2, 2), "SAME"),
            "mean_of_real": lambda i: nn.avg_pool(
                i["image"], (3, 3), (2, 2), "SAME", count_include_pad=False
            ),
            "sum": lambda i: window(i, "image", lax.add, 0, (1, 3, 2, 1), (1, 1, 2, 1), pads),
            "line": lambda i: window(i, "x", lax.max, -np.inf, (1, 2, 1), (1, 2, 1), "VALID"),
            "sum_of_line": lambda i: window(i, "small", lax.add, 0, (1, 2), (1, 1), "SAME"),
            "cube": lambda i: window(
                i, "volume", lax.max, -np.inf, (1, 2, 2, 2, 1), (1, 2, 2, 2, 1), "VALID"
            ),
            "channels": lambda i: window(i, "image", lax.max, -np.inf, (1, 1, 1, 2), (1, 1, 1, 2), "VALID"),
        }
    )
    kinds = [node.op_type for node in model.graph.node]
    assert (kinds.count("MaxPool"), kinds.count("AveragePool")) == (6, 3)  # the two means share theirs


def test_indexing() -> None:
    table = RNG.normal(size=(4, 3)).astype(np.float32)
    grid = RNG.normal(size=(4, 4, 2)).astype(np.float32)
    first = lambda i: i["index"][0, 0]  # noqa: E731
    window = lambda row, k: lax.dynamic_slice(row, (k[0], 1), (2, 3))  # noqa: E731
    update = lax.dynamic_update_slice
    run(
        {
            "constant": lambda i: i["x"][:, 2] + i["x"][:, -1],
            "constant_window": lambda i: i["x"][:, 1:3],
            "constant_list": lambda i: i["x"][:, jnp.array([3, 0, 3])],
            "first_example": lambda i: i["x"][0][None] + i["x"],
            "without_last": lambda i: jnp.concatenate([i["small"][:1], i["small"][:-1]]),
            "embedding": lambda i: jnp.asarray(table)[i["index"]],
            "embedding_fills": lambda i: jnp.take(table, i["outside"], axis=0),
            "embedding_clips": lambda i: jnp.take(table, i["outside"], axis=0, mode="clip"),
            "two_indices": lambda i: jnp.asarray(grid)[i["index"], i["index"][:, ::-1]],
            "axis": lambda i: jnp.take(i["x"], jnp.array([0, 3]), axis=2),
            "along_axis": lambda i: jnp.take_along_axis(i["x"], i["index"][:, :, None], 1),
            "along_last": lambda i: jnp.take_along_axis(i["int"], i["index"], 1),
            "batched_row": lambda i: jax.vmap(lambda row, k: row[k[0]])(i["x"], i["index"]),
            "batched_window": lambda i: jax.vmap(window)(i["x"], i["index"]),
            "dynamic_slice": lambda i: lax.dynamic_slice_in_dim(i["x"], first(i), 3, 1),
            "dynamic_slice_clamps": lambda i: lax.dynamic_slice_in_dim(i["x"], first(i) + 4, 3, 1),
            "dynamic_update": lambda i: update(i["x"], i["y"][:, :2], (0, first(i) + 3, 0)),
            "dynamic_update_two": lambda i: update(i["x"], i["y"][:, :2, :1], (0, first(i), first(i))),
            "set": lambda i: i["x"].at[:, 2].set(7.0),
            "set_window": lambda i: i["x"].at[:, 1:3].set(i["y"][:, :2]),
            "add": lambda i: i["x"].at[:, 2, 1].add(7.0),
            "set_points": lambda i: i["x"].at[:, jnp.array([0, 3])].set(i["y"][:, :2]),
            "set_corner": lambda i: i["x"].at[:, :2, :2].add(i["y"][:, :2, :2]),
        }
    )


def test_loops_and_branches() -> None:
    def recur(reverse: bool, length: int | None = None) -> Callable[[dict[str, Any]], Any]:
        def case(i: dict[str, Any]) -> Any:
            series = jnp.moveaxis(jnp.tile(i["x"], (1, 2 if length is None else 1, 1)), 1, 0)
            series = series if length is None else series[:length]

            def step(carry: Any, x: Any) -> Any:
                count, total = carry
                total = jnp.tanh(total + x)
                return (count + 1, total), total * count

            (count, total), ys = lax.scan(step, (0, jnp.zeros_like(i["small"])), series, reverse=reverse)
            return total + count + jnp.moveaxis(ys, 0, 1).sum(1) * jnp.arange(4.0)[None] + ys[0]

        return case

    def branch(i: dict[str, Any], pick: Any, count: int) -> Any:
        functions = [jnp.sin, jnp.negative, lambda v: v * 2, jnp.exp]
        return lax.switch(pick, functions[:count], i["small"])

    model = run(
        {
            "scan": recur(False),
            "scan_reverse": recur(True),
            "short_scan": recur(False, 4),
            "short_scan_reverse": recur(True, 4),
            "fori": lambda i: lax.fori_loop(0, 20, lambda k, v: jnp.cos(v) + k * 0.1, i["x"]),
            "while": lambda i: lax.while_loop(
                lambda s: s[0] < 7, lambda s: (s[0] + 2, s[1] * 1.5 + i["small"]), (0, i["small"])
            )[1],
            "while_never": lambda i: lax.while_loop(lambda v: v[0, 0] > 1e9, lambda v: v + 1, i["small"]),
            "cond": lambda i: lax.cond(
                i["index"][0, 0] < 2, jnp.sin, lambda v: v @ jnp.ones((4, 4)), i["small"]
            ),
            "switch": lambda i: branch(i, i["index"][0, 0], 4),
            "switch_clamps": lambda i: branch(i, i["outside"][0, 0], 3),
            "constant_branch": lambda i: branch(i, 1, 3),
            "remat": lambda i: jax.checkpoint(jnp.sin)(i["x"]),
            "custom_rule": lambda i: jax.nn.relu(i["x"]) + jax.nn.silu(i["y"]),
            "vmap": lambda i: jax.vmap(lambda row: row / row.sum())(i["x"]),
            "platform": lambda i: lax.platform_dependent(i["x"], cpu=jnp.sin, default=jnp.sin),
        }
    )
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Loop") == 5  # two scans, fori and two while; the short scans are written out
    assert kinds.count("If") == 3
    assert "MatMul" not in kinds  # a branch that is not taken is not computed
    assert "MatMul" in operators(model.graph)
