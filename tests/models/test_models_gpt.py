"""jaxtrain.models.gpt, .transformer and .sampling: causality, positions, modes, generated text."""

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
from flax import linen as nn

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Model, leaf_paths
from jaxtrain.losses import CrossEntropy
from jaxtrain.models import sampling
from jaxtrain.models.adapter import as_model
from jaxtrain.models.gpt import GPT
from jaxtrain.models.precision import compute_in
from jaxtrain.models.sampling import generate
from jaxtrain.models.transformer import Block, rotate
from jaxtrain.step.gradients import gradient_of

RNG = np.random.default_rng(0)
KEY = jax.random.key(1)
QUICK = jax.random.key(1, impl="unsafe_rbg")  # initialisations compile in half the time
SMALL = GPT(vocab=11, context=8, width=8, depth=1, heads=2, mlp=2, dropout=0.0)
LEARNED = SMALL.clone(positions="learned")


def tokens(n: int = 3, length: int = 8, vocab: int = 11) -> np.ndarray:
    return RNG.integers(0, vocab, (n, length), dtype=np.uint8)


@functools.cache
def random_state(module: Any, shape: tuple[int, ...] = (3, 8)) -> Any:
    """Return random params of the model's shapes, without compiling an initialisation."""
    rng = np.random.default_rng(1)
    batch = {"tokens": jax.ShapeDtypeStruct(shape, jnp.uint8)}
    params, extra = jax.eval_shape(as_model(module).init, KEY, batch)
    return jax.tree.map(lambda x: (0.5 * rng.normal(size=x.shape)).astype(x.dtype), params), extra


@functools.partial(jax.jit, static_argnames=("module", "train"))
def run_model(module: Any, params: Any, tokens: Any, train: bool = False, key: Any = None) -> Any:
    return as_model(module).apply(params, {}, {"tokens": tokens}, train=train, key=key)[0]


# --- the block


def norm(x: Any, p: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def numpy_block(params: Any, x: Any, heads: int, causal: bool, rotary: bool) -> np.ndarray:
    """Compute a block for one sequence ``[length, width]``, head by head and pair by pair."""

    def dense(x: Any, p: Any) -> Any:
        return x @ p["kernel"] + p["bias"]

    def turned(x: Any) -> Any:
        half = x.shape[1] // 2
        z = x[:, :half] + 1j * x[:, half:]
        for t in range(len(z)):
            for i in range(half):
                z[t, i] *= np.exp(1j * t * 10_000 ** (-i / half))
        return np.concatenate([z.real, z.imag], axis=1)

    def gelu(x: Any) -> Any:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    length, width = x.shape
    qkv = {"kernel": params["qkv"]["kernel"].reshape(width, -1), "bias": params["qkv"]["bias"].reshape(-1)}
    q, k, v = np.split(dense(norm(x, params["norm0"]), qkv), 3, axis=1)
    size, out = width // heads, np.zeros((length, width))
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        qh, kh = (turned(m[:, part]) if rotary else m[:, part] for m in (q, k))
        for t in range(length):
            seen = t + 1 if causal else length
            weight = np.exp(kh[:seen] @ qh[t] / math.sqrt(size))
            out[t, part] = weight @ v[:seen, part] / weight.sum()
    x = x + dense(out, {**params["project"], "kernel": params["project"]["kernel"].reshape(width, width)})
    return x + dense(gelu(dense(norm(x, params["norm1"]), params["expand"])), params["contract"])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rotary", [True, False])
def test_block_equals_a_numpy_implementation(causal: bool, rotary: bool) -> None:
    x = RNG.normal(size=(2, 5, 8)).astype(np.float32)
    block = Block(heads=2, mlp=3, causal=causal, rotary=rotary)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(block.init, KEY, x)["params"]
    params = jax.tree.map(lambda p: (0.5 * rng.normal(size=p.shape)).astype(np.float32), shapes)
    found = jax.jit(block.apply)({"params": params}, x)
    expected = [numpy_block(params, np.float64(row), 2, causal, rotary) for row in x]
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-4, atol=1e-4)


def numpy_gpt(module: GPT, params: Any, text: np.ndarray) -> np.ndarray:
    """Compute the logits of ``text: int [batch, length]`` in NumPy."""
    rows = []
    for row in text:
        x = params["embed"]["embedding"][row]
        if module.positions == "learned":
            x = x + params["position_table"][: len(row)]
        for i in range(module.depth):
            x = numpy_block(params[f"block{i}"], x, module.heads, True, module.positions == "rotary")
        rows.append(norm(x, params["norm"]) @ params["embed"]["embedding"].T)
    return np.stack(rows)


def test_rotated_scores_depend_on_the_distance_alone() -> None:
    length = 12
    q, k = (np.tile(RNG.normal(size=(1, 1, 2, 6)), (1, length, 1, 1)).astype(np.float32) for _ in range(2))
    scores = np.asarray(jnp.einsum("bqhd,bkhd->hqk", rotate(q), rotate(k)))
    for distance in range(-length + 1, length):
        diagonal = scores.diagonal(distance, 1, 2)
        np.testing.assert_allclose(diagonal, np.broadcast_to(diagonal[:, :1], diagonal.shape), atol=1e-4)
    assert np.ptp(scores[0, 0]) > 0.1
    np.testing.assert_allclose(np.linalg.norm(rotate(q), axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-5)


@pytest.mark.full("tests/models/test_models_gpt.py::test_rotated_scores_depend_on_the_distance_alone")
def test_rotation_of_bfloat16_is_exact_to_bfloat16_at_far_positions() -> None:
    x = jnp.ones((1, 1000, 1, 4), jnp.bfloat16)
    found = rotate(x)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(found), rotate(x.astype(jnp.float32)), atol=0.01)


# --- GPT


def test_gpt_has_the_parameters_counted_by_hand() -> None:
    w, hidden = 384, 4 * 384
    block = 2 * 2 * w + (w * 3 * w + 3 * w) + (w * w + w) + (w * hidden + hidden) + (hidden * w + w)
    expected = 256 * w + 6 * block + 2 * w  # the head is the embedding
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(made_shapes(GPT()))]
    assert sum(sizes) == expected == 10_745_856
    learned = [math.prod(leaf.shape) for leaf in jax.tree.leaves(made_shapes(GPT(positions="learned")))]
    assert sum(learned) == expected + 256 * w


def made_shapes(module: Any) -> Any:
    return jax.eval_shape(as_model(module).init, KEY, {"tokens": jnp.zeros((1, 8), jnp.uint8)})[0]


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint16])
def test_logits_are_float32_one_row_a_token_for_tokens_of_any_integer_type(dtype: Any) -> None:
    found = jax.eval_shape(
        functools.partial(run_model, SMALL), random_state(SMALL)[0], tokens().astype(dtype)
    )
    assert found.shape == (3, 8, 11) and found.dtype == jnp.float32


@pytest.mark.full("[rotary]")
@pytest.mark.parametrize(
    "module",
    [SMALL.clone(depth=2), LEARNED, SMALL.clone(vocab=300)],
    ids=["rotary", "learned", "more than a byte"],
)
def test_gpt_equals_a_numpy_implementation(module: Any) -> None:
    text, params = tokens(vocab=min(module.vocab, 256)), random_state(module)[0]
    found = run_model(module, params, text)
    np.testing.assert_allclose(found, numpy_gpt(module, params, text), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module", [SMALL, LEARNED], ids=["rotary", "learned"])
def test_token_changes_only_its_own_and_later_logits(module: Any) -> None:
    text, params = tokens(), random_state(module)[0]
    before = run_model(module, params, text)
    for t in range(8):
        changed = text.copy()
        changed[:, t] = (changed[:, t] + 1) % 11
        after = run_model(module, params, changed)
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        moved = np.abs(after - before).max(-1)[:, t:]
        assert (moved > 1e-5).all()


@pytest.mark.full("tests/models/test_models_gpt.py::test_gpt_equals_a_numpy_implementation")
def test_initialisation_is_that_of_gpt2() -> None:
    module = GPT(vocab=50, context=40, width=48, depth=2, heads=2, positions="learned")
    params, _ = jax.jit(as_model(module).init)(QUICK, {"tokens": tokens(1)})
    for name, std in [("qkv", 0.02), ("expand", 0.02), ("project", 0.01), ("contract", 0.01)]:
        kernels = np.stack([params[f"block{i}"][name]["kernel"] for i in range(2)])
        assert kernels.std() == pytest.approx(std, rel=0.05)
        assert not any(params[f"block{i}"][name]["bias"].any() for i in range(2))
    for leaf in (params["embed"]["embedding"], params["position_table"]):
        assert float(leaf.std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.full(
    "tests/models/test_models_gpt.py::test_dropout_acts_on_the_embedding_and_on_both_residual_branches"
)
def test_gpts_dropout_acts_in_training_only_and_by_its_key_only() -> None:
    module, text = SMALL.clone(dropout=0.5), tokens()
    params = random_state(module)[0]
    drawn = run_model(module, params, text, train=True, key=KEY)
    np.testing.assert_array_equal(drawn, run_model(module, params, text, train=True, key=KEY))
    assert not np.allclose(drawn, run_model(module, params, text, train=True, key=jax.random.key(2)))
    plain = run_model(SMALL, params, text, train=True, key=KEY)
    assert not np.allclose(drawn, plain)
    evaluated = run_model(module, params, text)
    np.testing.assert_array_equal(evaluated, run_model(module, params, text, key=KEY))
    np.testing.assert_allclose(evaluated, plain, rtol=1e-5, atol=1e-6)


def test_dropout_acts_on_the_embedding_and_on_both_residual_branches() -> None:
    params = random_state(SMALL)[0]
    x, block, one, two = (
        np.ones((3, 8, 8), np.float32),
        params["block0"],
        jax.random.key(1),
        jax.random.key(2),
    )
    dropping = Block(heads=2, mlp=2, dropout=0.5)
    run = jax.jit(lambda p, key: dropping.apply({"params": p}, x, train=True, rngs={"dropout": key}))
    for off in ("project", "contract"):
        silent = {**block, off: jax.tree.map(np.zeros_like, block[off])}
        assert not np.allclose(run(silent, one), run(silent, two))
    module, zeroed = SMALL.clone(dropout=0.5), {**params, "block0": jax.tree.map(np.zeros_like, block)}
    found = [run_model(module, zeroed, FIXED, train=True, key=key) for key in (one, two)]
    assert not np.allclose(*found)


CASES: dict[str, Any] = {
    "vocab": 13,
    "context": 9,
    "width": 16,
    "depth": 2,
    "heads": 4,
    "mlp": 3,
    "dropout": 0.5,
    "positions": "rotary",
}
ELSEWHERE = ("attention", "head_chunk")  # which change no result: test_attention.py, test_logits.py
FIELDS = [f.name for f in dataclasses.fields(GPT) if f.name not in ("parent", "name", *ELSEWHERE)]
FIXED = tokens()


@functools.cache
def effect(module: Any) -> Any:
    params = random_state(module)[0]
    return np.round(run_model(module, params, FIXED, train=True, key=KEY), 5).tolist()


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_of_a_gpt_changes_something(field: str) -> None:
    base = LEARNED if field in ("context", "positions") else SMALL
    other = base.clone(**{field: CASES[field]})
    # Parameters of another shape are a change that needs no compiling.
    assert made_shapes(other) != made_shapes(base) or effect(other) != effect(base)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("module", [SMALL.clone(dropout=0.5), LEARNED], ids=["rotary", "learned"])
def test_bfloat16_stays_bfloat16(module: Any, train: bool) -> None:
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), random_state(module)[0])

    def apply(params: Any, text: Any) -> Any:
        return as_model(module).apply(params, {}, {"tokens": text}, train=train, key=KEY)[0]

    jaxpr, found = jax.make_jaxpr(apply, return_shape=True)(params, tokens())
    assert found.dtype == jnp.bfloat16
    types = re.findall(r":(\w+)\[[\d,]*\] = dot_general", str(jaxpr))
    # Five products with kernels, and two of attention, of which the scores are float32.
    assert sorted(types) == ["bf16"] * 6 + ["f32"]


@pytest.mark.full("tests/step/test_float32_sums.py")
@pytest.mark.parametrize("module", [SMALL, SMALL.clone(head_chunk=4)], ids=["whole", "in chunks"])
def test_statistics_and_sums_of_a_bfloat16_model_are_float32(module: Any) -> None:
    """Softmax, LayerNorm, loss, and the gradients of 2,048 tokens, compared with float32."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 11, (256, 9))
    batch = {"tokens": drawn[:, :-1].astype(np.uint8), "label": drawn[:, 1:].astype(np.int32)}
    grads = []
    for precision in ("float32", "bfloat16"):
        gradient = gradient_of(compute_in(module, precision), CrossEntropy())
        run = jax.jit(lambda p, gradient=gradient: gradient(p, {}, batch, KEY, None))
        grads.append(run(random_state(module)[0]).grads)
        text = str(jax.make_jaxpr(run)(random_state(module)[0]))
    for operation in ("exp", "log", "rsqrt", "reduce_max", "logistic"):
        assert not re.search(rf":bf16\[[\d,]*\] = {operation}\b", text), operation
    assert ":f32" in text and re.search(r":bf16\[[\d,]*\] = dot_general", text)
    for path, exact in leaf_paths(grads[0]).items():
        found = leaf_paths(grads[1])[path]
        assert found.dtype == np.float32
        assert np.linalg.norm(found - exact) < 0.03 * np.linalg.norm(exact), path


@pytest.mark.parametrize(
    ("module", "text", "message"),
    [
        (
            SMALL,
            (2, 11),
            r"tokens \(2, 11\): sequences of 11 are 3 longer than GPT's context of 8; .*model\.context=11",
        ),
        (SMALL, (8,), r"tokens are uint8 \(8,\): GPT takes integers \[batch, length\]"),
        (SMALL, (2, 8, 1), r"\(2, 8, 1\)"),
        (SMALL.clone(heads=3), (2, 8), r"GPT\(width=8, heads=3\): heads must divide width; set model\.width"),
        (SMALL.clone(heads=0), (2, 8), r"heads=0"),
        (
            SMALL.clone(heads=8),
            (2, 8),
            r"rotary positions need an even head size, and it is 1; set model\.heads",
        ),
        (SMALL.clone(depth=0), (2, 8), r"depth=0, mlp=2\): all must be at least 1"),
        (SMALL.clone(vocab=0), (2, 8), r"vocab=0"),
        (SMALL.clone(context=0), (2, 8), r"context=0"),
        (SMALL.clone(mlp=0), (2, 8), r"mlp=0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(module: Any, text: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        jax.eval_shape(as_model(module).init, KEY, {"tokens": jnp.zeros(text, jnp.uint8)})
    assert "\n" not in str(raised.value)


def test_tokens_that_are_not_integers_are_refused() -> None:
    with pytest.raises(InputError, match=r"tokens are float32 \(2, 8\)"):
        jax.eval_shape(as_model(SMALL).init, KEY, {"tokens": jnp.zeros((2, 8))})


def test_learned_positions_allow_an_odd_head_size() -> None:
    assert made_shapes(LEARNED.clone(heads=8))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            [[1, 2], [3, 11]],
            r"token 11 of example 70 is outside the vocabulary of 11, 0\.\.10 \(1 such\): .*vocab=12",
        ),
        ([[1, 99], [30, 4]], r"token 99 of example 50 .*\(2 such\): set model\.vocab=100 or more"),
        ([[1, 2], [3, -1]], r"token -1 of example 70 .*\(1 such\): fix the tokens"),
        ([[1.0, 2.0], [3.0, 4.0]], r"field 'tokens' is float64"),
    ],
)
def test_check_names_a_token_outside_the_vocabulary_and_its_example(bad: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        SMALL.check({"tokens": np.array(bad)}, np.array([50, 70]))
    assert "\n" not in str(raised.value)


def test_check_passes_every_token_of_the_vocabulary() -> None:
    SMALL.check({"tokens": np.array([[0, 10]], np.uint8)}, np.array([0]))
    GPT().check({"tokens": np.array([[0, 255]], np.uint8)}, np.array([0]))
    GPT(vocab=300).check({"tokens": np.array([[0, 255]], np.uint8)}, np.array([0]))
    SMALL.check({"other": np.array([99])}, np.array([0]))


# --- sampling


def naive(module: Any, params: Any, text: np.ndarray, length: int, context: int, choose: Any) -> np.ndarray:
    """Generate by running the model on exactly the tokens so far, at most ``context`` of them."""
    for i in range(length):
        logits = numpy_gpt(module, params, text[:, -context:])[:, -1]
        text = np.concatenate([text, np.asarray(choose(i, logits))[:, None].astype(np.int32)], axis=1)
    return text


@pytest.mark.full("[beyond it]")
@pytest.mark.parametrize(
    ("module", "start", "length", "context"),
    [(SMALL, 1, 5, 8), (LEARNED, 3, 12, 5), (SMALL, 7, 3, 4)],
    ids=["within the context", "beyond it", "from beyond it"],
)
def test_generation_equals_the_naive_loop(module: Any, start: int, length: int, context: int) -> None:
    params, prompt = random_state(module)[0], tokens(2, start)
    made_up = generate(module, params, {}, prompt, length, KEY, context=context, temperature=0.7)

    def draw(i: int, logits: Any) -> Any:
        return jax.random.categorical(jax.random.fold_in(KEY, i), logits / 0.7)

    assert made_up.shape == (2, start + length) and made_up.dtype == jnp.int32
    np.testing.assert_array_equal(made_up, naive(module, params, prompt, length, context, draw))


@pytest.mark.full("tests/models/test_models_gpt.py::test_generation_equals_the_naive_loop")
def test_temperature_zero_is_the_most_likely_token_whatever_the_key() -> None:
    params, prompt = random_state(SMALL)[0], tokens(2, 3)
    greedy = functools.partial(generate, SMALL, params, {}, prompt, 9, context=8, temperature=0)
    expected = naive(SMALL, params, prompt, 9, 8, lambda i, logits: logits.argmax(-1))
    np.testing.assert_array_equal(greedy(KEY), expected)
    np.testing.assert_array_equal(greedy(jax.random.key(5)), expected)


def follow(params: Any, extra: Any, batch: Any, *, train: bool, key: Any) -> Any:
    """A model whose logits are its parameters, whatever the text."""
    assert train is False and key is None
    return jnp.broadcast_to(params[None, None], (*batch["tokens"].shape, len(params))), extra


UNIGRAM = Model(lambda key, batch: ({}, {}), follow)
LOGITS = np.log(np.float32([0.1, 0.5, 0.15, 0.25]))


def sample_tokens(logits: Any, **options: Any) -> np.ndarray:
    text = generate(UNIGRAM, logits, {}, np.zeros((400, 1), int), 10, KEY, context=1, **options)
    return np.bincount(np.asarray(text)[:, 1:].ravel(), minlength=4) / 4000


@pytest.mark.full(
    "tests/models/test_models_gpt.py::test_top_k_draws_among_the_k_most_likely_by_temperature_even_when_tied"
)
def test_tokens_are_drawn_by_their_probability_and_temperature() -> None:
    for temperature in (1.0, 0.5, 3.0):
        p = np.exp(LOGITS / temperature)
        np.testing.assert_allclose(sample_tokens(LOGITS, temperature=temperature), p / p.sum(), atol=0.03)


def test_top_k_draws_among_the_k_most_likely_by_temperature_even_when_tied() -> None:
    np.testing.assert_allclose(sample_tokens(LOGITS, top_k=2), [0, 2 / 3, 0, 1 / 3], atol=0.03)
    np.testing.assert_allclose(sample_tokens(LOGITS, top_k=2, temperature=0.5), [0, 0.8, 0, 0.2], atol=0.03)
    assert (sample_tokens(np.zeros(4, np.float32), top_k=2) > 0).sum() == 2
    assert sample_tokens(LOGITS, top_k=2, temperature=0).tolist() == [0, 1, 0, 0]


def test_same_key_same_text_and_rows_and_steps_differ() -> None:
    flat, prompt = np.zeros(50, np.float32), [[1], [1]]
    keys = (jax.random.key(k) for k in (1, 1, 2))
    one, same, other = (np.asarray(generate(UNIGRAM, flat, {}, prompt, 20, k, context=4)) for k in keys)
    np.testing.assert_array_equal(one, same)
    assert (one != other).any() and (one[0] != one[1]).any()
    assert len(set(one[0].tolist())) > 5


def test_second_call_does_not_compile() -> None:
    before = []
    for temperature, seed in [(0.5, 1), (0.9, 2)]:
        before.append(sampling._generate._cache_size())
        key, prompt = jax.random.key(seed), tokens(2, 1)
        generate(
            SMALL.clone(), random_state(SMALL)[0], {}, prompt, 5, key, context=8, temperature=temperature
        )
    assert sampling._generate._cache_size() == before[1]


class Scaled(nn.Module):
    """A model whose logits depend on its statistics."""

    @nn.compact
    def __call__(self, text: jax.Array, train: bool = False) -> jax.Array:
        best = self.variable("batch_stats", "best", lambda: jnp.zeros((), jnp.int32))
        return jnp.broadcast_to(jax.nn.one_hot(best.value, 6)[None, None], (*text.shape, 6))


def test_statistics_are_used_for_pairs_and_modules() -> None:
    extra = {"batch_stats": {"best": jnp.array(4)}, "ema": {"unused": jnp.zeros(2)}}
    for model in (Scaled(), as_model(Scaled())):
        text = generate(model, {}, extra, [[0]], 3, KEY, context=8, temperature=0)
        assert text.tolist() == [[0, 4, 4, 4]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": np.zeros((1, 0), int)}, r"prompt is empty \(\(1, 0\)\): give at least one token"),
        ({"prompt": np.zeros((0, 3), int)}, "prompt is empty"),
        ({"prompt": np.zeros(3, int)}, r"prompt is int\d\d of shape \(3,\): give integers \[batch, n\]"),
        ({"prompt": np.zeros((1, 3))}, "prompt is float"),
        ({"prompt": np.array([[3, 11]])}, "token 11 of example 0 is outside the vocabulary of 11"),
        ({"length": 0}, "length=0: it must be at least 1"),
        ({"context": 0}, "context=0: it must be at least 1"),
        ({"context": 9}, "sequences of 9 are 1 longer than GPT's context of 8"),
        ({"temperature": -0.1}, "temperature=-0.1: it must be 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, r"top_k=0: it must be in 1\.\.vocab"),
        ({"top_k": 12}, r"top_k=12 with a vocabulary of 11: it must be in 1\.\.11"),
    ],
)
def test_arguments_outside_their_range_are_refused_in_one_line(change: Any, message: str) -> None:
    given = {"prompt": np.array([[1]]), "length": 12, "key": KEY, "context": 8, **change}
    with pytest.raises(InputError, match=message) as raised:
        generate(SMALL, random_state(SMALL)[0], {}, **given)
    assert "\n" not in str(raised.value)


def test_model_without_logits_for_each_token_is_refused() -> None:
    pair = Model(lambda *_: ({}, {}), lambda p, e, batch, *, train, key: (jnp.zeros((1, 5)), e))
    with pytest.raises(InputError, match=r"the model returns \(1, 5\) for tokens \(1, 2\)"):
        generate(pair, {}, {}, [[1]], 2, KEY, context=4)
