"""The recurrent models, the factors and the U-Net: shapes, modes, padding, precision, checks."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxtrain.core.errors import InputError
from jaxtrain.models import as_model
from jaxtrain.models.matrix_factorization import Factors
from jaxtrain.models.recurrent import GRUForecaster, LSTMClassifier
from jaxtrain.models.unet import UNet

pytestmark = pytest.mark.full("tests/models/test_models.py")

RNG = np.random.default_rng(0)
KEY = jax.random.key(1)
POOLS = ["last", "mean", "max"]

TOKENS = RNG.integers(0, 20, (5, 6)).astype(np.uint8)
LENGTH = np.array([6, 1, 0, 4, 3], np.int32)
BATCHES: dict[type, dict[str, Any]] = {
    LSTMClassifier: {"tokens": TOKENS, "length": LENGTH},
    GRUForecaster: {"series": RNG.normal(size=(4, 5, 2)).astype(np.float32)},
    Factors: {"user": np.array([0, 6, 3]), "item": np.array([4, 0, 2])},
    UNet: {"image": RNG.normal(size=(2, 4, 8, 1)).astype(np.float32)},
}
BASES: dict[type, Any] = {
    LSTMClassifier: LSTMClassifier(vocab=20, width=3, embedding=2),
    GRUForecaster: GRUForecaster(width=3, horizon=4, variables=2),
    Factors: Factors(users=7, items=5, width=3),
    UNet: UNet(widths=(2, 3)),
}
SHAPES: dict[type, tuple[int, ...]] = {
    LSTMClassifier: (5, 2),
    GRUForecaster: (4, 4, 2),
    Factors: (3,),
    UNet: (2, 4, 8, 3),
}
# Settings with which dropout has an effect, where the base has none.
DROPS: dict[type, dict[str, Any]] = {
    LSTMClassifier: {"width": 16},
    GRUForecaster: {"width": 16},
    Factors: {"width": 16},
    UNet: {"widths": (2, 16), "batch_norm": False},  # which would be another reason to differ
}


def random_state(module: Any, batch: Any) -> Any:
    """Return random params and statistics of the model's shapes, without compiling an initialisation."""
    rng = np.random.default_rng(1)
    params, extra = jax.eval_shape(as_model(module).init, KEY, batch)
    filled = jax.tree.map(lambda x: (0.5 * rng.normal(size=x.shape)).astype(x.dtype), params)
    return filled, jax.tree.map(lambda x: np.ones(x.shape, x.dtype), extra)


def jit(run: Any, **options: Any) -> Any:
    """Compile with little optimisation: programs are tiny, and compilation takes most of a test's time."""
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": "0"}, **options)


def evaluated(module: Any, batch: Any, params: Any = None) -> np.ndarray:
    params, extra = random_state(module, batch) if params is None else (params, {})
    apply = jit(functools.partial(as_model(module).apply, train=False, key=None))
    return np.asarray(apply(params, extra, batch)[0])


# --- all models


@pytest.mark.parametrize("cls", BASES)
def test_outputs_have_the_promised_shape_and_the_type_of_the_weights(cls: type) -> None:
    model, batch = as_model(BASES[cls]), BATCHES[cls]
    params, extra = jax.eval_shape(model.init, KEY, batch)

    def half(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x

    low = {name: half(field) for name, field in batch.items()}
    for train in (False, True):
        apply = functools.partial(model.apply, train=train)
        out, after = jax.eval_shape(apply, params, extra, batch, key=KEY)
        assert (out.shape, out.dtype) == (SHAPES[cls], jnp.float32)
        out, kept = jax.eval_shape(apply, jax.tree.map(half, params), extra, low, key=KEY)
        assert (out.shape, out.dtype) == (SHAPES[cls], jnp.bfloat16)
        assert jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, after)


@pytest.mark.parametrize("cls", [LSTMClassifier, GRUForecaster])
def test_recurrence_in_half_precision_is_close_to_float32(cls: type) -> None:
    module, batch = BASES[cls], BATCHES[cls]
    params, _ = random_state(module, batch)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    fields = {n: f.astype(jnp.bfloat16) if f.dtype == np.float32 else f for n, f in batch.items()}
    np.testing.assert_allclose(
        evaluated(module, fields, low).astype(np.float32), evaluated(module, batch, params), atol=0.1
    )


@pytest.mark.parametrize("cls", BASES)
def test_dropout_acts_in_training_only_and_by_its_key_only(cls: type) -> None:
    module, batch = BASES[cls].clone(dropout=0.5, **DROPS[cls]), BATCHES[cls]
    params, extra = random_state(module, batch)

    @functools.partial(jit, static_argnums=(0, 1))
    def run(module: Any, train: bool, key: Any) -> Any:
        return as_model(module).apply(params, extra, batch, train=train, key=key)[0]

    drawn = run(module, True, KEY)
    np.testing.assert_array_equal(drawn, run(module, True, KEY))
    assert not np.allclose(drawn, run(module, True, jax.random.key(2)))
    whole = run(module.clone(dropout=0.0), True, KEY)
    assert not np.allclose(drawn, whole)
    np.testing.assert_allclose(run(module, False, None), whole, rtol=1e-6)


@pytest.mark.parametrize("cls", [LSTMClassifier, GRUForecaster])
def test_dropout_is_between_layers_too(cls: type) -> None:
    """Make the head ignore its own dropout, so that only dropout between layers has an effect."""
    module, batch = BASES[cls].clone(layers=2, dropout=0.5, width=16), BATCHES[cls]
    params, _ = random_state(module, batch)

    def below(path: Any, x: jax.Array) -> jax.Array:
        return x if "layer1" not in jax.tree_util.keystr(path) else jnp.zeros_like(x)

    # The upper layer without weights hands on nothing: all that varies by key is gone.
    silent = jax.tree_util.tree_map_with_path(below, params)
    apply = functools.partial(as_model(module).apply, train=True)
    run = jit(apply)
    one, two = (run(silent, {}, batch, key=jax.random.key(k))[0] for k in (1, 2))
    np.testing.assert_allclose(one, two)
    # Two layers drop twice: with the same key above, removing the lower mask changes the result.
    seen = jax.make_jaxpr(lambda key: apply(params, {}, batch, key=key)[0])(KEY)
    assert str(seen).count("random_bits") == 2


def test_statistics_move_in_training_only_by_momentum() -> None:
    module, batch = UNet(widths=(2,), bn_momentum=0.75), {"image": BATCHES[UNet]["image"]}
    model = as_model(module)
    params, extra = random_state(module, batch)
    assert model.apply(params, extra, batch, train=False, key=None)[1] is extra
    moved = model.apply(params, extra, batch, train=True, key=KEY)[1]["batch_stats"]["bottom_conv0_norm"]
    conv = nn.Conv(2, (3, 3), use_bias=False).apply({"params": params["bottom_conv0"]}, batch["image"])
    np.testing.assert_allclose(moved["mean"], 0.75 + 0.25 * conv.mean((0, 1, 2)), rtol=1e-4)


FIELDS: dict[type, dict[str, Any]] = {
    LSTMClassifier: {
        "vocab": 21,
        "width": 4,
        "embedding": 3,
        "layers": 2,
        "bidirectional": True,
        "pool": "mean",
        "classes": 3,
        "dropout": 0.5,
    },
    GRUForecaster: {
        "width": 4,
        "layers": 2,
        "horizon": 3,
        "variables": 3,
        "dropout": 0.5,
        "residual": False,
    },
    Factors: {
        "users": 8,
        "items": 6,
        "width": 4,
        "hidden": (3,),
        "bias": False,
        "mean": 2.0,
        "dropout": 0.5,
    },
    UNet: {
        "widths": (2, 4),
        "classes": 2,
        "batch_norm": False,
        "bn_momentum": 0.5,
        "bn_groups": 2,
        "dropout": 0.5,
    },
}
NAMES = [(cls, f.name) for cls in FIELDS for f in dataclasses.fields(cls) if f.name not in ("parent", "name")]


@functools.cache
def shapes(module: Any) -> Any:
    """Return the shapes of weights, statistics and outputs as text, without compiling."""
    model, batch = as_model(module), BATCHES[type(module)]
    params, extra = jax.eval_shape(model.init, KEY, batch)
    apply = functools.partial(model.apply, train=True)
    return str((params, jax.eval_shape(apply, params, extra, batch, key=KEY)))


@functools.cache
def effect(module: Any) -> Any:
    model, batch = as_model(module), BATCHES[type(module)]
    params, extra = random_state(module, batch)
    apply = jit(functools.partial(model.apply, train=True))
    start = jit(model.init)(KEY, batch)[0]["mean"] if isinstance(module, Factors) else 0
    found = {"after": apply(params, extra, batch, key=KEY), "start": start}
    return jax.tree.map(lambda x: np.round(x, 5).tolist(), found)


@pytest.mark.parametrize(("cls", "field"), NAMES)
def test_every_field_of_a_model_changes_something(cls: type, field: str) -> None:
    base = BASES[cls]
    if field == "variables":  # of the output only where the change from the last row is not asked for
        base = base.clone(residual=False)
    changed = base.clone(**{field: FIELDS[cls][field]})
    assert shapes(changed) != shapes(base) or effect(changed) != effect(base)


SMALLEST = [
    (LSTMClassifier(vocab=0), "LSTMClassifier.vocab is 0"),
    (LSTMClassifier(layers=0), "LSTMClassifier.layers is 0"),
    (LSTMClassifier(pool="sum"), "pool is 'sum': it must be last, mean or max"),  # type: ignore[arg-type]
    (GRUForecaster(horizon=0), "GRUForecaster.horizon is 0"),
    (Factors(users=7, items=5, hidden=(0,)), "all must be at least 1"),
    (UNet(widths=()), "all must be at least 1"),
    (UNet(widths=(4, 0)), "all must be at least 1"),
]


@pytest.mark.parametrize(("module", "message"), SMALLEST)
def test_settings_out_of_range_are_refused(module: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        jax.eval_shape(as_model(module).init, KEY, BATCHES[type(module)])
    assert "\n" not in str(raised.value)


SHAPELESS = [
    (LSTMClassifier(), {"tokens": TOKENS[0], "length": LENGTH}, r"tokens \(6,\) and length \(5,\)"),
    (LSTMClassifier(), {"tokens": TOKENS, "length": LENGTH[:, None]}, r"length \(5, 1\)"),
    (GRUForecaster(), {"series": np.zeros((4, 7))}, r"series has shape \(4, 7\).*batch, window, variables"),
    (GRUForecaster(), {"series": np.zeros((4, 0, 7))}, r"series has shape \(4, 0, 7\)"),
    (
        Factors(7, 5),
        {"user": np.zeros((3, 1), int), "item": np.zeros(3, int)},
        r"user \(3, 1\) and item \(3,\)",
    ),
    (UNet(), {"image": np.zeros((2, 16, 12, 3))}, r"\(2, 16, 12, 3\): UNet with 4 widths .* multiples of 8"),
    (
        UNet(),
        {"image": np.zeros((2, 20, 16, 3))},
        "multiples of 8: pad, crop or resize .* fewer model.widths",
    ),
    (UNet(), {"image": np.zeros((2, 3, 32, 32))}, "NCHW"),
    (UNet(), {"image": np.zeros((2, 4, 8, 3))}, "too small"),
]


@pytest.mark.parametrize(("module", "batch", "message"), SHAPELESS)
def test_inputs_of_another_shape_are_refused_in_one_line(module: Any, batch: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        jax.eval_shape(as_model(module).init, KEY, batch)
    assert "\n" not in str(raised.value)


# --- LSTMClassifier


@pytest.mark.parametrize(
    ("pool", "bidirectional"), [("last", False), ("last", True), ("mean", True), ("max", True)]
)
def test_padding_changes_neither_logits_nor_gradients(pool: Any, bidirectional: bool) -> None:
    module = BASES[LSTMClassifier].clone(pool=pool, bidirectional=bidirectional)
    params, _ = random_state(module, BATCHES[LSTMClassifier])
    padding = np.arange(6) >= LENGTH[:, None]

    @jit
    def run(tokens: Any) -> Any:
        def total(params: Any) -> Any:
            logits = as_model(module).apply(
                params, {}, {"tokens": tokens, "length": LENGTH}, train=False, key=None
            )[0]
            return (logits**2).sum(), logits

        return jax.grad(total, has_aux=True)(params)

    kept = run(jnp.array(TOKENS, jnp.int32))
    for other in (7, 19, 9999, -1):
        found = run(jnp.array(np.where(padding, other, TOKENS), jnp.int32))
        jax.tree.map(np.testing.assert_array_equal, found, kept)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept))  # a length of 0 is among them
    np.testing.assert_array_equal(kept[1][2], params["head"]["bias"])
    changed = run(jnp.array(np.where(padding, TOKENS, (TOKENS + 1) % 20), jnp.int32))
    same = np.isclose(changed[1], kept[1]).all(-1)
    assert same.tolist() == (LENGTH == 0).tolist()


def test_length_beyond_the_window_is_clipped() -> None:
    module = BASES[LSTMClassifier].clone(pool="mean")
    params, _ = random_state(module, BATCHES[LSTMClassifier])
    cut, long = (
        evaluated(module, {"tokens": TOKENS, "length": np.full(5, n, np.int32)}, params) for n in (6, 60)
    )
    np.testing.assert_array_equal(cut, long)


@pytest.mark.parametrize(("dtype", "steps"), [(np.uint8, 256), (np.int8, 200)])
def test_lstm_with_more_steps_than_the_length_dtype_can_represent(dtype: type, steps: int) -> None:
    module = BASES[LSTMClassifier].clone(bidirectional=True)
    tokens, length = RNG.integers(0, 20, (2, steps)).astype(np.uint8), np.array([3, 120])
    params, _ = random_state(module, {"tokens": tokens, "length": length.astype(np.int32)})
    narrow, wanted = (
        evaluated(module, {"tokens": tokens, "length": length.astype(kind)}, params)
        for kind in (dtype, np.int32)
    )
    np.testing.assert_array_equal(narrow, wanted)


@pytest.mark.parametrize("pool", POOLS)
def test_pooled_states_equal_their_definitions(pool: Any) -> None:
    """Compare a padded row with a plain loop over Flax's cell, in each direction."""
    module = BASES[LSTMClassifier].clone(pool=pool, bidirectional=True)
    params, _ = random_state(module, BATCHES[LSTMClassifier])
    row, cell = 3, nn.OptimizedLSTMCell(3)
    words = params["embedding"]["embedding"][TOKENS[row, : LENGTH[row]]]
    vectors = []
    for direction in ("forward", "backward"):
        carry, states = (jnp.zeros(3), jnp.zeros(3)), []
        for x in words if direction == "forward" else words[::-1]:
            carry, h = cell.apply({"params": params[f"layer0_{direction}"]}, carry, x)
            states.append(h)
        figures = {"last": states[-1], "mean": np.mean(states, 0), "max": np.max(states, 0)}
        vectors.append(figures[pool])
    wanted = np.concatenate(vectors) @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(evaluated(module, BATCHES[LSTMClassifier], params)[row], wanted, rtol=1e-4)


def test_every_layer_reads_the_previous_one() -> None:
    found = jax.eval_shape(
        as_model(BASES[LSTMClassifier].clone(layers=2, bidirectional=True)).init, KEY, BATCHES[LSTMClassifier]
    )[0]
    assert set(found) == {
        "embedding",
        "head",
        *(f"layer{n}_{way}" for n in (0, 1) for way in ("forward", "backward")),
    }
    assert found["layer0_forward"]["ii"]["kernel"].shape == (2, 3)
    assert found["layer1_backward"]["ii"]["kernel"].shape == (6, 3)


IDS = np.array([70, 71, 72])


@pytest.mark.parametrize(("token", "most"), [(20, 21), (300, 301), (-1, 0)])
def test_token_outside_the_vocabulary_is_refused_by_example(token: int, most: int) -> None:
    tokens = np.array([[1, 2, 3], [0, token, 5], [19, 0, 0]])
    batch = {"tokens": tokens, "length": np.array([3, 2, 1])}
    with pytest.raises(
        InputError, match=rf"token {token} of example 71 is outside 0\.\.19 \(1 such"
    ) as raised:
        BASES[LSTMClassifier].check(batch, IDS)
    assert "model.vocab" in str(raised.value) and "\n" not in str(raised.value)
    assert f"at least {most}" in str(raised.value)
    BASES[LSTMClassifier].check({**batch, "length": np.array([3, 1, 1])}, IDS)  # it is padding now


def test_check_accepts_every_token_of_the_vocabulary_and_bytes() -> None:
    batch = {"tokens": np.arange(256, dtype=np.uint8).reshape(2, 128), "length": np.array([128, 128])}
    LSTMClassifier().check(batch, IDS)
    LSTMClassifier().check({"image": np.zeros(3)}, IDS)


# --- GRUForecaster


def test_forecast_with_a_zero_head_repeats_the_last_row() -> None:
    module, batch = BASES[GRUForecaster], BATCHES[GRUForecaster]
    params, _ = random_state(module, batch)
    silent = {**params, "head": jax.tree.map(jnp.zeros_like, params["head"])}
    np.testing.assert_array_equal(
        evaluated(module, batch, silent), np.repeat(batch["series"][:, -1:], 4, axis=1)
    )
    assert not evaluated(module.clone(residual=False), batch, silent).any()


def test_residual_reads_and_forecasts_differences_from_the_last_row() -> None:
    module, batch = BASES[GRUForecaster], BATCHES[GRUForecaster]
    params, _ = random_state(module, batch)
    last = batch["series"][:, -1:]
    change = evaluated(module.clone(residual=False), {**batch, "series": batch["series"] - last}, params)
    np.testing.assert_allclose(evaluated(module, batch, params), change + last, rtol=1e-5, atol=1e-6)
    higher = evaluated(module, {**batch, "series": batch["series"] + 100}, params)
    np.testing.assert_allclose(higher, change + last + 100, rtol=1e-5)


def test_forecast_equals_a_loop_over_the_cell_of_flax_and_one_dense_layer() -> None:
    module, batch = BASES[GRUForecaster].clone(residual=False, layers=2), BATCHES[GRUForecaster]
    params, _ = random_state(module, batch)
    x = list(np.swapaxes(batch["series"], 0, 1))
    for layer in ("layer0", "layer1"):
        carry, states = jnp.zeros((4, 3)), []
        for row in x:
            carry, h = nn.GRUCell(3).apply({"params": params[layer]}, carry, row)
            states.append(h)
        x = states
    wanted = nn.Dense(8).apply({"params": params["head"]}, x[-1]).reshape(4, 4, 2)
    np.testing.assert_allclose(evaluated(module, batch, params), wanted, rtol=1e-4, atol=1e-6)


def test_other_variables_are_refused_only_where_the_last_row_is_added() -> None:
    batch = {"series": np.zeros((2, 5, 3), np.float32)}
    with pytest.raises(
        InputError, match=r"has 3 variables and model.variables is 2: .*set model.variables=3"
    ):
        jax.eval_shape(as_model(BASES[GRUForecaster]).init, KEY, batch)
    assert evaluated(BASES[GRUForecaster].clone(residual=False), batch).shape == (2, 4, 2)


# --- Factors


def test_rating_is_mean_and_biases_and_the_product_of_the_vectors() -> None:
    module, batch = BASES[Factors], BATCHES[Factors]
    params, _ = random_state(module, batch)
    u, v = params["user"]["embedding"][batch["user"]], params["item"]["embedding"][batch["item"]]
    wanted = params["mean"] + (u * v).sum(-1)
    np.testing.assert_allclose(evaluated(module.clone(bias=False), batch, params), wanted, rtol=1e-5)
    wanted = wanted + params["user_bias"]["embedding"][batch["user"], 0]
    wanted = wanted + params["item_bias"]["embedding"][batch["item"], 0]
    np.testing.assert_allclose(evaluated(module, batch, params), wanted, rtol=1e-5)


def test_towers_are_dense_layers_with_a_relu_between() -> None:
    module, batch = BASES[Factors].clone(hidden=(4, 2), bias=False), BATCHES[Factors]
    params, _ = random_state(module, batch)

    def tower(name: str) -> Any:
        x = params[name]["embedding"][batch[name]]
        x = x @ params[f"{name}_dense0"]["kernel"] + params[f"{name}_dense0"]["bias"]
        return np.maximum(x, 0) @ params[f"{name}_dense1"]["kernel"] + params[f"{name}_dense1"]["bias"]

    wanted = params["mean"] + (tower("user") * tower("item")).sum(-1)
    np.testing.assert_allclose(evaluated(module, batch, params), wanted, rtol=1e-4)


def test_factors_start_at_the_mean() -> None:
    module = Factors(users=7, items=5, mean=2.5)
    params, _ = jit(as_model(module).init)(KEY, BATCHES[Factors])
    np.testing.assert_allclose(evaluated(module, BATCHES[Factors], params), 2.5, atol=0.01)


@pytest.mark.parametrize("name", ["user", "item"])
@pytest.mark.parametrize("beyond", [0, 3, None])
def test_id_out_of_range_is_refused_by_example(name: str, beyond: int | None) -> None:
    size = {"user": 7, "item": 5}[name]
    batch = {"user": np.array([0, 6, 3]), "item": np.array([4, 0, 2])}
    BASES[Factors].check(batch, IDS)
    bad = -1 if beyond is None else size + beyond
    batch[name][1] = bad
    message = rf"{name} {bad} of example 71 is outside 0\.\.{size - 1} \(1 such\): set model.{name}s"
    with pytest.raises(InputError, match=message) as raised:
        BASES[Factors].check(batch, IDS)
    assert "\n" not in str(raised.value)


# --- UNet


def test_upsampling_equals_a_transposed_convolution() -> None:
    """``UNet._upsample`` equals a 2×2 transposed convolution with stride 2."""

    class Up(UNet):
        @nn.compact
        def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
            return self._upsample(image, 3, "up")

    x = RNG.normal(size=(2, 3, 4, 5)).astype(np.float32)
    params = Up().init(KEY, x)["params"]
    # [c, 2, 2, width] → [2, 2, c, width], which Flax applies back to front.
    kernel = params["up"]["kernel"].transpose(1, 2, 0, 3)[::-1, ::-1]
    bias = RNG.normal(size=3).astype(np.float32)
    ours = Up().apply(
        {"params": {"up": {"kernel": params["up"]["kernel"], "bias": np.broadcast_to(bias, (2, 2, 3))}}}, x
    )
    theirs = nn.ConvTranspose(3, (2, 2), (2, 2)).apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_skips_reach_the_logits_and_the_bottom_has_a_wide_receptive_field() -> None:
    module = UNet(widths=(2, 3), batch_norm=False, classes=1)
    x = RNG.normal(size=(1, 8, 16, 1)).astype(np.float32)
    params, _ = random_state(module, {"image": x})

    def influence(params: Any) -> Any:
        def corner(image: Any) -> Any:
            return module.apply({"params": params}, image)[0, 0, 0, 0]

        return np.array(jit(jax.grad(corner))(x))[0, :, :, 0]

    # Biases above keep every ReLU open, so the gradient shows what is connected.
    open_ = jax.tree_util.tree_map_with_path(
        lambda path, p: np.full(p.shape, 9.0, p.dtype) if "bias" in jax.tree_util.keystr(path) else np.abs(p),
        params,
    )
    both = influence(open_)
    without = {**open_, "up0": jax.tree.map(np.zeros_like, open_["up0"])}
    skip = influence(without)
    far = np.abs(both) > 0
    assert far[:, 6:].any() and not (np.abs(skip) > 0)[:, 5:].any()  # four 3×3 at full size reach 4 pixels
    assert (np.abs(skip) > 0)[:5, :5].all()


@pytest.mark.parametrize("batch_norm", [True, False])
def test_convolutions_have_a_bias_unless_batch_norm_follows(batch_norm: bool) -> None:
    module = UNet(widths=(2, 3, 4), batch_norm=batch_norm)
    params, extra = jax.eval_shape(as_model(module).init, KEY, {"image": np.zeros((1, 4, 4, 1))})
    convs = [leaves for name, leaves in params.items() if name.endswith(("conv0", "conv1"))]
    assert len(convs) == 10
    assert all(("bias" in leaves) != batch_norm for leaves in convs)
    assert bool(extra) == batch_norm
