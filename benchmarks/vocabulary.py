"""Time and memory of the head and loss of a GPT in chunks of positions, against all logits at once.

Loss and gradients of a GPT of one block (width 128, 8 sequences of 128 tokens), vocabularies of 256, 8,192
and 50,304, with ``head_chunk=16`` and without: time, and XLA's figure for the temporaries of the compiled
program (``memory_analysis``), which is exact. Both sides compute the same loss.

  python -m benchmarks.vocabulary [--precision float32] [--rounds N] [--out FILE]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import common
from jaxtrain.losses import CrossEntropy
from jaxtrain.models import GPT, compute_in
from jaxtrain.step.gradients import gradient_of

VOCABULARIES = (256, 8_192, 50_304)
BATCH, LENGTH, WIDTH, CHUNK = 8, 128, 128, 16


def side(vocab: int, chunk: int | None, precision: Any) -> tuple[Callable[[], Any], int, float]:
    """A function that computes a loss and its gradients and waits; the program's temporaries; the loss."""
    net = GPT(vocab=vocab, context=LENGTH, width=WIDTH, depth=1, heads=2, dropout=0.0, head_chunk=chunk)
    model, rng = compute_in(net, precision), np.random.default_rng(0)
    text = rng.integers(0, vocab, (BATCH, LENGTH + 1)).astype(np.int32)
    batch = jax.device_put({"tokens": text[:, :-1], "label": text[:, 1:]})
    key = jax.random.key(0)
    params, _ = jax.jit(model.init)(key, batch)
    gradient = gradient_of(model, CrossEntropy())

    @jax.jit
    def run(params: Any, batch: Any) -> Any:
        found = gradient(params, {}, batch, key, None)
        return found.loss, found.grads

    memory = run.lower(params, batch).compile().memory_analysis().temp_size_in_bytes
    loss = float(run(params, batch)[0])
    return lambda: jax.block_until_ready(run(params, batch)), memory, loss


def main() -> None:
    """Every vocabulary, one JSON object."""
    parser = common.arguments(__doc__, rounds=9)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    results, figures = [], {}
    for vocab in VOCABULARIES:
        full, chunked = (side(vocab, chunk, args.precision) for chunk in (None, CHUNK))
        assert abs(full[2] - chunked[2]) < (1e-4 if args.precision == "float32" else 0.05), "another loss"
        sides = {"full logits": common.each(full[0], 1), "in chunks": common.each(chunked[0], 1)}
        times = common.interleave(sides, args.rounds)
        results.append(
            common.speedup(f"vocabulary {vocab:,}: time", times["full logits"], times["in chunks"])
        )
        results.append(common.result(f"vocabulary {vocab:,}: memory", [full[1] / chunked[1]], "×"))
        figures[f"vocabulary {vocab:,}"] = {
            "ms": common.medians(times, 1e3),
            "temporaries_mb": {"full logits": full[1] / 1e6, "in chunks": chunked[1] / 1e6},
            "logits_mb": BATCH * LENGTH * vocab * 4 / 1e6,
        }
    figures["setting"] = {
        "precision": args.precision,
        "batch": BATCH,
        "length": LENGTH,
        "width": WIDTH,
        "head_chunk": CHUNK,
    }
    common.finish(args, "vocabulary", results, figures)


if __name__ == "__main__":
    main()
