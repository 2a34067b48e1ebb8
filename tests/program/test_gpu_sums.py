"""Programs for NVIDIA GPUs: sums over the batch in float32, and the dtype of gradients between devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from gpu_programs import collective_dtypes, compile_step, half_reductions, needs_compiler

from jaxtrain.models import GPT, MLP, ResNet

WITNESS = "tests/step/test_float32_sums.py::test_no_sum_of_a_train_step_accumulates_in_half_precision"
REDUCE = "tests/step/test_float32_sums.py::test_products_for_gradients_write_the_dtype_that_devices_add_up"
LABEL = {"label": jax.ShapeDtypeStruct((64,), jnp.int32)}
TOKENS = {name: jax.ShapeDtypeStruct((64, 64), jnp.int32) for name in ("tokens", "label")}
IMAGES = {"image": jax.ShapeDtypeStruct((64, 32, 32, 3), jnp.float32), **LABEL}
GPT2 = GPT(vocab=256, context=64, width=128, depth=2, heads=4, attention="xla")


@needs_compiler
@pytest.mark.full(WITNESS)
def test_no_reduction_of_a_gpu_program_with_xlas_attention_adds_in_bfloat16() -> None:
    """With cuDNN's, and of other models: tests/plan/test_gpu_goldens.py."""
    text = compile_step(GPT2, TOKENS)
    assert " reduce(" in text and half_reductions(text) == []


@needs_compiler
@pytest.mark.full(REDUCE)
@pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=4"])
@pytest.mark.parametrize("dtype", ["float32", "compute"])
def test_gpus_add_up_gradients_in_the_chosen_dtype(dtype: str, mesh: str) -> None:
    text = compile_step(GPT2, TOKENS, mesh=mesh, grad_reduce_dtype=dtype)
    kind = "reduce-scatter" if "fsdp" in mesh else "all-reduce"
    totals = collective_dtypes(text, kind)
    matrices = 2 * 12 * 128 * 128 + 256 * 128
    assert totals.get("f32" if dtype == "float32" else "bf16", 0) >= matrices
    assert totals.get("bf16" if dtype == "float32" else "f32", 0) < matrices / 8  # biases, scales, tables


@needs_compiler
@pytest.mark.full(REDUCE)
def test_a_small_gpu_program_scatters_every_gradient_that_fsdp_divides() -> None:
    """Without a barrier XLA all-reduces a gradient in full if several operations use the slice of it."""
    model, batch = (
        MLP(widths=(256, 256), classes=10),
        {"image": jax.ShapeDtypeStruct((64, 256), jnp.float32), **LABEL},
    )
    for dtype in ("float32", "compute"):
        text = compile_step(model, batch, mesh="data=2,fsdp=4", grad_reduce_dtype=dtype)
        full = sum(collective_dtypes(text, "all-reduce").values())
        assert sum(collective_dtypes(text, "reduce-scatter").values()) >= 2 * 256 * 256
        assert full < 256 * 256  # a quarter of each, between the two halves of the mesh


@needs_compiler
@pytest.mark.full(
    "tests/step/test_float32_sums.py::test_gradients_of_convolution_kernels_stay_in_half_precision"
)
def test_gpus_scatter_the_gradients_of_convolution_kernels() -> None:
    """A conversion to float32 between the sum over the devices and the slice would leave it in full."""
    model = ResNet(stages=(1,), width=64, classes=10, block="basic", stem="cifar")
    text = compile_step(model, IMAGES, mesh="data=2,fsdp=4")
    scattered = collective_dtypes(text, "reduce-scatter").get("bf16", 0)
    assert scattered >= 2 * 9 * 64 * 64
    assert sum(collective_dtypes(text, "all-reduce").values()) < scattered / 2
