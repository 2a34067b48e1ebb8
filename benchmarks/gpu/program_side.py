"""A shipped experiment compiled on the devices of this machine, in a process that trains on request.

python -m benchmarks.gpu.program_side EXPERIMENT CARD MESH DEVICES [SETTING ...]

CARD, as for ``plan --for``, gives the speeds of the lower bound; ``-`` is none. MESH is as for ``--mesh``;
``-`` is one device. Data that are not here are replaced by zeros, as in ``plan --for``. The process prints a
line of JSON like that of ``plan --json``, then answers as ``benchmarks.gpu.side`` does.
"""

from __future__ import annotations

import json
import re
import sys
import time
from typing import Any

import jax

from benchmarks.gpu import side
from benchmarks.gpu.measure import Steps
from jaxtrain import plan, sharding
from jaxtrain.cli import experiments
from jaxtrain.core.text import first_line
from jaxtrain.plan import gpu_report, report
from jaxtrain.program import Program, assemble, device_limits
from jaxtrain.program.memory import abstract_batch, mesh_of
from jaxtrain.program.throughput import update_flops
from jaxtrain.sharding import cards

WORKSPACE = re.compile(r'u8\[(\d+)\][^=]* custom-call\(.*custom_call_target="(__cudnn|__cublas)')


def compile_here(program: Program, card: cards.Card | None) -> dict[str, Any]:
    """Compile the step of ``program`` on its devices, and read it as ``plan --for`` reads a described one.

    A program that was compiled for a CPU is read in the same way. Its figures mean nothing, but show that the
    readers work.
    """
    mesh, notes = mesh_of(program), list[str]()
    planned = plan.measure(program, count=False)
    lowered = program.train_step.lower(  # type: ignore[attr-defined]
        program.abstract_state, abstract_batch(program), program.key
    )
    try:
        compiled, graphs = plan.compile_with_graphs(lowered)
        if graphs is None:
            notes.append("CUDA graphs are unknown: XLA listed none")
    except Exception as error:  # of the list of graphs: the rest is still read
        compiled, graphs = lowered.compile(), None
        notes.append(f"CUDA graphs are unknown: {first_line(error)[:200]}")
    text = compiled.as_text()
    found = report.as_json(planned, device_limits.limit_of(mesh))
    flops = update_flops(program)
    step = plan.read_gpu_step(
        text, mesh, card, flops, planned.precision, graphs, program.attention, gpus_per_host=mesh.size
    )
    workspaces = [int(size) for size, _ in WORKSPACE.findall(text)]
    return found | {
        "gpu": gpu_report.as_json(step),
        "flops": {"step": flops, "example": flops / planned.batch},
        "workspaces": {"calls": len(workspaces), "largest": max(workspaces, default=0)},
        "notes": [*found["notes"], *notes],
    }


def make_program(name: str, mesh: str, devices: int, settings: list[str]) -> tuple[Program, list[str]]:
    """Assemble a shipped experiment on devices of this machine; also returns notes about its data."""
    _, _, experiment = experiments.load_experiment(name, settings)
    experiment, notes = plan.describe_absent(experiment)
    chosen = jax.local_devices()[:devices]
    where = sharding.make_mesh(chosen, None if mesh == "-" else sharding.parse_mesh(mesh, devices))
    experiment, _ = plan.for_device_memory(experiment, device_limits.limit_of(where))
    return assemble(plan.with_open_data(experiment, where), where), list(notes)


def main(name: str, card: str, mesh: str, devices: str, *settings: str) -> None:
    """Compile, print the plan, and serve until the input ends."""
    began = time.perf_counter()
    program, notes = make_program(name, mesh, int(devices), list(settings))
    found = compile_here(program, None if card == "-" else cards.load_card(card))
    device = jax.local_devices()[0]
    about = {"platform": device.platform, "device": device.device_kind}
    seconds = {"compile_seconds": time.perf_counter() - began}
    print(json.dumps(found | about | seconds | {"notes": [*notes, *found["notes"]]}), flush=True)
    side.serve({"step": lambda: Steps(program, fixed=True)})


if __name__ == "__main__":
    main(*sys.argv[1:])
