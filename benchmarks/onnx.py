"""Inference of ``cifar_small_cnn``: its ONNX file in ONNX Runtime against ``jax.jit``, on a CPU.

The pool is exported as one ``MaxPool``, and, to compare, as the slices and maxima that training computes.
Weights and images are random: what is in them costs no time. All sides run on all cores, interleaved.

  python -m benchmarks.onnx [--batches N,N] [--rounds N] [--out FILE]
"""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from jaxtrain import models
from jaxtrain.artifact.onnx import check, to_onnx
from jaxtrain.artifact.onnx.verify import make_session
from jaxtrain.models import lenet, pooling

SECONDS = 0.2  # timed at once, about


def sliced_pool(x: jax.Array, size: int) -> jax.Array:
    """``models.max_pool`` as it is traced for training."""
    return pooling._pool(x, pooling._windows(x, size, size, "VALID"))


def build() -> tuple[Any, Any, dict[str, Any]]:
    """The pure function, its weights, and the models by name."""
    model = models.as_model(models.ConvNet(widths=(32, 64), kernel=3, padding="SAME", classes=10))
    image = {"image": jax.ShapeDtypeStruct((32, 32, 3), jnp.float32)}
    params, extra = jax.jit(model.init)(jax.random.key(0), {"image": jnp.zeros((1, 32, 32, 3))})

    def apply(weights: Any, inputs: Any) -> dict[str, Any]:
        return {"logits": model.apply(weights, extra, inputs, train=False, key=None)[0]}

    with mock.patch.object(lenet, "max_pool", sliced_pool):
        sliced = to_onnx(apply, params, image)
    return apply, params, {"MaxPool": to_onnx(apply, params, image), "slices": sliced}


def main() -> None:
    """All sides interleaved, one JSON object."""
    parser = common.arguments(__doc__, rounds=15)
    parser.add_argument("--batches", default="1,32,256")
    args = parser.parse_args()
    apply, params, exported = build()
    compiled = jax.jit(apply)
    sessions = {name: make_session(model) for name, model in exported.items()}
    results, milliseconds = [], {}
    for batch in map(int, args.batches.split(",")):
        image = np.random.default_rng(0).normal(size=(batch, 32, 32, 3)).astype(np.float32)
        want = compiled(params, {"image": image})
        for model in exported.values():
            check(model, {"image": image}, want, batches=(batch,))
        on_device = jax.device_put({"image": image})
        runs: dict[str, Any] = {
            f"onnxruntime, {name}": lambda s=session, x=image: s.run(None, {"image": x})
            for name, session in sessions.items()
        }
        runs["jax.jit"] = lambda x=on_device: jax.block_until_ready(compiled(params, x))
        sides = {}
        for name, run in runs.items():
            run()
            units = max(1, int(SECONDS / common.each(run, 1)()))
            sides[name] = common.each(lambda r=run, n=units: [r() for _ in range(n)], units)
        times = common.interleave(sides, args.rounds)
        fast = times["onnxruntime, MaxPool"]
        for slow in ("onnxruntime, slices", "jax.jit"):
            results.append(common.speedup(f"batch {batch}: MaxPool over {slow}", times[slow], fast))
        milliseconds[batch] = common.medians(times, 1e3)
    figures = {
        "note": "shared machine, busy with other work (see load_before): read the ratios, not the times",
        "milliseconds": milliseconds,
        "operators": {name: dict(Counter(n.op_type for n in m.graph.node)) for name, m in exported.items()},
        "versions": {name: importlib.metadata.version(name) for name in ("onnx", "onnxruntime")},
    }
    common.finish(args, "onnx", results, figures)


if __name__ == "__main__":
    main()
