"""One side of a comparison of ``scripts/gpu_check.py``, in a process that trains on request.

python -m benchmarks.gpu.side jaxtrain|torch gpt|resnet50 BATCH [--tiny]

It describes itself in one line of JSON, and answers each line ``NAME UPDATES`` with the seconds of an update.
So JAX and PyTorch, whose libraries conflict within one process, take turns on one card.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

Work = Callable[[int], None]
"""Carries out so many updates and waits for them."""


def jaxtrain_side(name: str, batch: int, tiny: bool) -> tuple[dict[str, Any], dict[str, Callable[[], Work]]]:
    """Ours: what it is, and its variants by name; memory is that of ``plan`` and of two updates."""
    import jax

    from benchmarks.gpu import workloads
    from benchmarks.gpu.measure import Steps, mesh
    from jaxtrain.plan import measure
    from jaxtrain.program import assemble
    from jaxtrain.program.throughput import update_flops

    began = time.perf_counter()
    exp = workloads.gpt(batch, tiny) if name == "gpt" else workloads.resnet50(batch, tiny)
    program = assemble(exp, mesh())
    planned = measure(program, count=False)  # compiles, while nothing else is on the device
    steps = Steps(program)
    steps(2)
    device = jax.devices()[0]
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    about = {
        "batch": batch,
        "parameters": planned.parameters,
        "flops": update_flops(program),
        "tokens": exp.train.fields["tokens"][:batch].size if name == "gpt" else None,
        "compile_seconds": time.perf_counter() - began,
        "planned_bytes": planned.total,
        "planned_parts": planned.bytes,
        "peak_bytes": peak,
    }
    variants: dict[str, Callable[[], Work]] = {"default": lambda: steps}
    if name == "gpt":
        exp_xla = workloads.gpt(batch, tiny, attention="xla")
        variants["xla attention"] = lambda: Steps(assemble(exp_xla, mesh()))
    return about, variants


def torch_side(name: str, batch: int, tiny: bool) -> tuple[dict[str, Any], dict[str, Callable[[], Work]]]:
    """The same network under ``torch.compile``."""
    from benchmarks.gpu import torch_models

    began = time.perf_counter()
    trainer = torch_models.Trainer(name, batch, tiny)
    trainer.steps(2)
    about = {**trainer.about(), "batch": batch, "compile_seconds": time.perf_counter() - began}
    return about, {"default": lambda: trainer.steps}


def main(kind: str, name: str, batch: str, *flags: str) -> None:
    """Describe the side, and serve until the input ends."""
    make = {"jaxtrain": jaxtrain_side, "torch": torch_side}[kind]
    about, variants = make(name, int(batch), "--tiny" in flags)
    print(json.dumps(about), flush=True)
    serve(variants)


def serve(variants: Mapping[str, Callable[[], Work]]) -> None:
    """Answer lines ``NAME UPDATES`` until the input ends; a variant is made when it is first asked for."""
    made: dict[str, Work] = {}
    for line in sys.stdin:
        variant, _, updates = line.strip().rpartition(" ")
        if variant not in made:
            made[variant] = variants[variant]()
            made[variant](2)
        began = time.perf_counter()
        made[variant](int(updates))
        print(json.dumps({"seconds": (time.perf_counter() - began) / int(updates)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
