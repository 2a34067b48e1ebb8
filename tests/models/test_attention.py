"""jaxtrain.models.attention: which kernel is used, and what happens if cuDNN has none.

Lowering for CUDA needs no GPU: the fixture ``hopper`` fakes a GPU for the model and a cuDNN for JAX.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.core.errors import InputError
from jaxtrain.core.types import Model
from jaxtrain.models import GPT, ViT, as_model, attention, compute_in
from jaxtrain.models.attention import attend, cudnn_refusal
from jaxtrain.models.attention_choices import AttentionChoice, record_attention
from jaxtrain.models.target_gpu import target_capability, trace_for

KEY = jax.random.key(0)
NET = GPT(vocab=16, context=32, width=128, depth=2, heads=2, dropout=0.1)


@pytest.fixture
def hopper(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(attention, "lowest_capability", lambda: (9, 0))
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_200)
    attention._jax_refusal.cache_clear()
    yield monkeypatch
    attention._jax_refusal.cache_clear()


def lower_gradient(
    module: Any, precision: Any, batch: Any, remat: Any = "none", platform: str = "cuda"
) -> str:
    """Return the StableHLO text of a gradient."""
    model = as_model(module, remat)
    computed = compute_in(model, precision)
    params, _ = jax.eval_shape(model.init, KEY, batch)

    def loss(params: Any, batch: Any, key: Any) -> Any:
        return computed.apply(params, {}, batch, train=True, key=key)[0].astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss)).trace(params, batch, KEY)
    return str(traced.lower(lowering_platforms=(platform,)).as_text())


TOKENS = {"tokens": jax.ShapeDtypeStruct((2, 24), jnp.uint8)}
IMAGE = {"image": jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)}
SCORES = re.compile(r"x24x24x\w")  # one for each pair of positions


@pytest.mark.full("[bfloat16]")
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_on_a_gpu_uses_cudnn_forward_and_backward(hopper, precision):
    text = lower_gradient(NET, precision, TOKENS)
    assert text.count("@__cudnn$fmhaSoftmax(") == text.count("@__cudnn$fmhaSoftmaxBackward(") == 2
    assert text.count("CAUSAL") == 4 and "NO_MASK" not in text
    assert not SCORES.search(text)


@pytest.mark.full("[dots_saveable]")
@pytest.mark.parametrize("remat", ["nothing_saveable", "dots_saveable"])
def test_rematerialised_blocks_use_cudnn_and_store_no_scores(hopper, remat):
    text = lower_gradient(NET, "bfloat16", TOKENS, remat)
    assert text.count("@__cudnn$fmhaSoftmaxBackward(") == 2 and not SCORES.search(text)


def test_image_models_attend_to_all_positions(hopper):
    text = lower_gradient(ViT(patch=4, width=128, depth=1, heads=2, classes=3), "bfloat16", IMAGE)
    assert text.count("@__cudnn$fmha") == 2 and "NO_MASK" in text and "CAUSAL" not in text


@pytest.mark.full("[no GPU]")
@pytest.mark.parametrize(
    ("module", "precision", "found"),
    [
        (NET, "float32", (9, 0)),
        (NET.clone(attention="xla"), "bfloat16", (9, 0)),
        (NET.clone(width=24), "bfloat16", (9, 0)),  # heads of 12
        (NET, "bfloat16", (7, 5)),
        (NET, "bfloat16", None),
    ],
    ids=["float32", "asked for", "size of a head", "old GPU", "no GPU"],
)
def test_unsupported_cases_use_xla(hopper, module, precision, found):
    hopper.setattr(attention, "lowest_capability", lambda: found)
    text = lower_gradient(module, precision, TOKENS)
    assert "cudnn" not in text and SCORES.search(text)


def test_without_cudnn_it_is_xla(monkeypatch):
    monkeypatch.setattr(attention, "lowest_capability", lambda: (9, 0))
    attention._jax_refusal.cache_clear()
    refusal = cudnn_refusal((2, 24, 2, 64), jnp.bfloat16, True)
    assert refusal in ("cuDNN is not detected", "cuDNN not found")  # without and with the CUDA plugin
    assert "cudnn" not in lower_gradient(NET, "bfloat16", TOKENS)
    attention._jax_refusal.cache_clear()


@pytest.mark.parametrize(
    ("shape", "dtype", "found", "reason"),
    [
        ((2, 24, 2, 64), jnp.float32, (9, 0), "it takes float16 and bfloat16, and this is float32"),
        ((2, 24, 2, 64), jnp.bfloat16, None, "JAX runs on no NVIDIA GPU here"),
        ((2, 24, 2, 64), jnp.bfloat16, (7, 5), "compute capability 8.0 or more, and a GPU here has 7.5"),
        ((2, 24, 2, 12), jnp.bfloat16, (9, 0), "a multiple of 8, but got 12"),
        ((2, 24, 2, 512), jnp.bfloat16, (9, 0), "a multiple of 8, but got 512"),
    ],
)
def test_cudnn_where_it_is_unsupported_is_refused_in_one_line(hopper, shape, dtype, found, reason):
    hopper.setattr(attention, "lowest_capability", lambda: found)
    q = jax.ShapeDtypeStruct(shape, dtype)
    assert reason in cudnn_refusal(shape, dtype, True)
    with pytest.raises(InputError, match=r"attention=cudnn and cuDNN refuses: .*; set model\.attention=auto"):
        jax.eval_shape(functools.partial(attend, causal=True, attention="cudnn"), q, q, q)
    assert jax.eval_shape(functools.partial(attend, causal=True), q, q, q).shape == shape


def test_model_with_cudnn_attention_is_initialised_in_float32(hopper):
    text = lower_gradient(NET.clone(attention="cudnn"), "bfloat16", TOKENS)
    assert text.count("@__cudnn$fmhaSoftmax(") == 2


def test_unknown_kernel_is_refused():
    q = jnp.ones((1, 4, 2, 8))
    with pytest.raises(InputError, match="attention is 'flash': it must be one of auto, xla, cudnn"):
        attend(q, q, q, True, "flash")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_program_on_a_cpu_is_that_of_jax(dtype, causal):
    q = jax.ShapeDtypeStruct((2, 8, 2, 16), dtype)

    def text(fn: Any) -> str:
        fn.__name__ = "same"
        return jax.jit(jax.grad(fn)).lower(q).as_text()

    ours = text(lambda q: attend(q, q, q, causal).astype(jnp.float32).sum())
    theirs = text(lambda q: jax.nn.dot_product_attention(q, q, q, is_causal=causal).astype(jnp.float32).sum())
    assert ours == theirs and "cudnn" not in ours


def test_cpu_has_no_capability():
    assert attention.lowest_capability() is None


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_both_kernels_agree(causal, size):
    """In values and gradients, as far as bfloat16 goes."""
    shape = (4, 200, 3, size)
    rng = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for _ in range(4))
    if attention.lowest_capability() is None or attention.lowest_capability() < attention.MIN_CAPABILITY:
        pytest.skip("cuDNN has no kernel for this GPU")

    def both(q: Any, k: Any, v: Any, kind: Any) -> Any:
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, causal, kind), q, k, v)
        return out, *pull(g)

    run = jax.jit(both, static_argnames="kind")
    assert "cudnn" in run.lower(q, k, v, "auto").as_text()
    found, expected = (jax.tree.map(np.float32, run(q, k, v, kind)) for kind in ("cudnn", "xla"))
    for ours, theirs in zip(found, expected, strict=True):
        assert np.linalg.norm(ours - theirs) < 0.02 * np.linalg.norm(theirs)


@pytest.mark.full(
    "tests/models/test_attention.py::test_half_precision_on_a_gpu_uses_cudnn_forward_and_backward"
)
def test_float16_runs_on_a_cpu_and_rounds_less_than_its_precision():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 8), jnp.float16)

    def total(q):
        return attend(q, k, v, causal=True).astype(jnp.float32).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(q)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    expected = jax.nn.dot_product_attention(*wide, is_causal=True)
    np.testing.assert_allclose(attend(q, k, v, causal=True), expected, atol=2e-3)
    assert gradient.dtype == jnp.float16 and np.isfinite(gradient).all()
    np.testing.assert_allclose(value, expected.sum(), rtol=2e-3)


@pytest.mark.full("[none]")
@pytest.mark.parametrize("remat", ["none", "nothing_saveable"])
def test_choices_are_recorded_once_by_layer_with_the_reason(hopper, remat):
    """Initialisation, which uses XLA's kernel, is not among them."""
    why = "it takes float16 and bfloat16, and this is float32"
    for precision, kernel, reason in (("float32", "xla", why), ("bfloat16", "cudnn", "")):
        with record_attention() as choices:
            lower_gradient(NET, precision, TOKENS, remat=remat)
        assert choices == [
            AttentionChoice(f"block{i}", (2, 24, 2, 64), precision, kernel, reason) for i in range(2)
        ]


def test_choices_of_an_application_without_gradients(hopper):
    model = as_model(NET)
    params, _ = jax.eval_shape(model.init, KEY, TOKENS)
    with record_attention() as choices:
        jax.eval_shape(lambda p, b: model.apply(p, {}, b, train=False, key=None)[0], params, TOKENS)
    assert [one.layer for one in choices] == ["block0", "block1"]


@pytest.mark.full("tests/models/test_attention.py::test_choices_are_recorded_once_by_layer_with_the_reason")
def test_choices_outside_of_the_recording_are_not_recorded():
    q = jnp.ones((1, 4, 2, 8))
    with record_attention() as choices:
        attend(q, q, q, True, "xla")
        attend(q, q, q, True)
        attend(q, q, q, True)  # the same again
    attend(q[:, :3], q[:, :3], q[:, :3], True)
    assert [(one.layer, one.kernel, one.shape) for one in choices] == [("", "xla", (1, 4, 2, 8))]


@pytest.mark.parametrize(
    ("capability", "kernel"), [((9, 0), "dot_product_attention"), ((7, 5), "dot_general")]
)
def test_a_model_is_traced_for_the_gpu_that_is_named(capability, kernel):
    checks = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    before = checks.check_cudnn_version, checks.check_compute_capability

    def init(key, batch):
        return {}, {}

    def apply(params, extra, batch, *, train, key):
        return attend(batch["x"], batch["x"], batch["x"], causal=True), extra

    def total(x):
        return model.apply({}, {}, {"x": x}, train=True, key=None)[0].astype(jnp.float32).sum()

    model, x = trace_for(Model(init, apply), capability), jnp.zeros((2, 24, 2, 256), jnp.bfloat16)
    text = str(jax.make_jaxpr(jax.grad(total))(x))  # heads of 256: only on Hopper and later
    assert kernel in text and ("dot_product_attention_bwd" in text) is (capability == (9, 0))
    assert (checks.check_cudnn_version, checks.check_compute_capability) == before
    assert target_capability() is None
