"""``python -m jaxtrain doctor``: check this machine, and say how to fix each problem."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtrain.cli import SUMMARIES, command_line
from jaxtrain.core import cache
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.files import user_path
from jaxtrain.core.process import cores
from jaxtrain.core.text import first_line

PACKAGES = (
    "jaxtrain",
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda12-pjrt",
    "nvidia-cuda-nvcc-cu12",
    "jax-cuda13-plugin",
    "flax",
    "optax",
    "orbax-checkpoint",
    "chex",
    "grain",
    "tensorflow-datasets",
    "tensorflow",
    "tensorflow-cpu",
    "numpy",
)


THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLE = "glibc.malloc.hugetlb"
GLIBC = (2, 35)  # the first version with the tunable


def make_parser() -> command_line.Parser:
    """Make the parser of this command."""
    parser = command_line.Parser("jaxtrain doctor", SUMMARIES["doctor"])
    parser.add_argument(
        "--for",
        dest="card",
        metavar="CARD",
        help="also check that this machine can compile for a GPU that it does not have (plan --for)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 if no problem was found and 3 otherwise."""
    return command_line.main(_run, make_parser(), argv)


def _run(args: argparse.Namespace) -> int:
    from jaxtrain.monitor import make_console

    console, card = make_console(), _card(args.card)
    problems: list[str] = []
    console.summary("versions", _versions())
    console.summary("devices", _devices(problems))
    console.summary("storage", _storage(problems))
    console.summary("one step", _step(problems))
    if card is not None:
        console.summary(f"compiling for {card.name}", _compile_for(card, problems))
    if problems:
        console.note("\n".join(["", "problems", *(f"  - {problem}" for problem in problems)]))
        return 3
    console.note("\nno problem found")
    return 0


def _versions() -> dict[str, str]:
    rows = {"python": f"{platform.python_version()} on {platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            rows[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return rows


def _devices(problems: list[str]) -> dict[str, str]:

    driver = _driver()
    rows = {"NVIDIA driver": driver or "none", "CPU cores": str(cores())}
    try:
        import jax

        from jaxtrain.monitor import nvml, peak_flops

        devices = jax.local_devices()
    except RuntimeError as error:
        problems.append(f"JAX cannot start a backend ({error}): reinstall jax, or set JAX_PLATFORMS=cpu")
        return rows
    for device in devices:
        stats = device.memory_stats() or {}
        memory = f", {stats['bytes_limit'] / 2**30:.1f} GiB" if "bytes_limit" in stats else ""
        rows[str(device)] = f"{device.device_kind}{memory}"
    if driver:
        rows["power"] = nvml.describe_boards(devices)
    rows["peak TFLOP/s"] = peak_flops.describe_peaks(devices[0])
    rows["host memory"] = f"{_host_memory() / 2**30:.1f} GiB"
    rows["huge pages"] = huge_page_status()
    if driver and devices[0].platform == "cpu":
        problems.append(
            "this machine has an NVIDIA driver, but JAX runs on the CPU: pip install 'jaxtrain[cuda12]' "
            "(or [cuda13] for a CUDA 13 driver)"
        )
    return rows


def huge_page_status() -> str:
    """Return whether malloc in this process uses huge pages, and how to enable them, in one line.

    XLA:CPU allocates the buffers of a program with malloc at every execution, so each step maps thousands
    of pages. glibc reads the tunable once, when the process starts.

    https://www.gnu.org/software/libc/manual/html_node/Memory-Allocation-Tunables.html
    """
    try:
        mode, libc = THP.read_text(), os.confstr("CS_GNU_LIBC_VERSION") or "the C library"
    except (OSError, ValueError):
        return "not supported by this system"
    if "[always]" in mode:
        return "enabled by the system for every process"
    if "[madvise]" not in mode:
        return f"disabled by the system ({THP})"
    name, _, version = libc.partition(" ")
    if name != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < GLIBC:
        return f"not supported by {libc}; needs glibc 2.35 or newer"
    tunables = [pair.partition("=") for pair in os.environ.get("GLIBC_TUNABLES", "").split(":")]
    if {key: value for key, _, value in tunables}.get(TUNABLE) == "1":
        return "enabled"
    return f"not enabled; to speed up steps on a CPU, start with GLIBC_TUNABLES={TUNABLE}=1"


def _storage(problems: list[str]) -> dict[str, str]:
    import jax

    from jaxtrain.data.data_dir import default_data_dir

    rows: dict[str, str] = {}
    folders = {}
    for name, find in (("working folder", lambda: user_path(".")), ("data folder", default_data_dir)):
        try:
            folders[name] = find()
        except InputError as error:
            problems.append(f"{name}: {error}")
    for name, folder in folders.items():
        base = folder
        while not base.exists():
            base = base.parent
        free = shutil.disk_usage(base).free / 2**30
        rows[name] = f"{folder} ({free:.1f} GiB free)"
        if not os.access(base, os.W_OK):
            problems.append(f"{base} is not writable: change its owner, or use another folder")
        if free < 1:
            problems.append(
                f"{base} has {free:.2f} GiB free, too little for checkpoints and data: free some space"
            )
    data = folders.get("data folder")
    prepared = sorted(p.name for p in data.iterdir() if p.is_dir()) if data and data.is_dir() else []
    rows["data sets"] = ", ".join(prepared) or "none (python -m jaxtrain prepare cifar10)"
    cache.enable_compilation_cache(problems.append)
    rows["compile cache"] = getattr(jax.config, "jax_compilation_cache_dir", None) or (
        "off (JAXTRAIN_CACHE or JAX_ENABLE_COMPILATION_CACHE disables it)"
    )
    return rows


def _step(problems: list[str]) -> dict[str, str]:
    """Compile, run and time a training step of a small network on every device."""
    import jax
    import numpy as np

    from jaxtrain import data, losses, models, optim, sharding
    from jaxtrain.experiment import Experiment
    from jaxtrain.program import assemble

    mesh = sharding.make_mesh()
    source = data.Synthetic(n=16 * mesh.devices.size, shape=(8, 8, 1))
    experiment = Experiment(
        model=models.CNN(widths=(8,), convs=1),
        train=source,
        test=source,
        loss=losses.CrossEntropy(),
        optimizer=optim.SGD(lr=0.1),
        preprocess=(data.Normalise(),),
        batch=8 * mesh.devices.size,
        epochs=1,
    )
    began = time.perf_counter()
    program = assemble(experiment, mesh)
    state = program.init()
    times = []
    for number in range(2):
        state, metrics = program.train_step(state, program.train.batch(number), program.key)
        loss = jax.device_get(metrics["loss"]).compute()
        times.append(time.perf_counter())
    if not np.isfinite(loss):
        problems.append(f"the loss of the test step is {loss}: check the device and its driver")
    return {
        "first step": f"{times[0] - began:.2f} s with compilation",
        "second step": f"{1e3 * (times[1] - times[0]):.1f} ms",
        "loss": f"{loss:.4f}",
    }


def _card(name: str | None) -> Any:
    """Load the card of ``--for``; JAX then starts on the CPU where there is no driver."""
    import jax

    from jaxtrain.core import cuda_plugin
    from jaxtrain.sharding import cards
    from jaxtrain.sharding.initialize import in_use

    if name is None:
        return None
    card = cards.load_card(name)
    if not in_use() and not cuda_plugin.has_driver():
        jax.config.update("jax_platforms", "cpu")
    return card


def _compile_for(card: Any, problems: list[str]) -> dict[str, str]:
    """Compile a matrix product for ``card``: it needs XLA's compiler, NVIDIA's math library and assembler."""
    import jax
    import jax.numpy as jnp

    from jaxtrain.sharding import described

    rows = {"device": f"{card.device_kind}, compute capability {card.capability[0]}.{card.capability[1]}"}
    began = time.perf_counter()
    try:
        [device] = described.described_devices(card)
        where = jax.sharding.SingleDeviceSharding(device)
        x = jax.ShapeDtypeStruct((128, 128), jnp.float32, sharding=where)
        lowered = jax.jit(lambda x: jnp.tanh(x @ x)).lower(x)
        with described.without_compilation_cache():
            lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        problems.append(f"XLA cannot compile for {card.name}: {described.why_not_compiled(error, card)}")
        return rows | {"program": "not compiled"}
    except (InputError, RunError) as error:
        problems.append(first_line(error))
        return rows | {"program": "not compiled"}
    return rows | {"program": f"compiled in {time.perf_counter() - began:.2f} s"}


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip().partition("\n")[0] or None


def _host_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
