"""Devices that exist as a description only: XLA compiles for them, and nothing runs.

XLA's GPU compiler needs no GPU and no driver, only the wheels of JAX's CUDA plugin and NVIDIA's assembler. A
mesh of described devices takes the place of a real one in ``program.assemble``, and shapes that of arrays.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AbstractMesh, Mesh

from jaxtrain.core import cuda_plugin
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.text import first_line
from jaxtrain.sharding.cards import Card

ASSEMBLERS = {"12": "nvidia-cuda-nvcc-cu12", "13": "nvidia-cuda-nvcc"}
TOOLKIT = Path("/usr/local/cuda")  # where XLA looks for ptxas beside the wheels and PATH
CUDNN = (9, 10, 0)  # the version that the program is compiled for
LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
TARGET = """\
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads_per_core}
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {card.shared_memory_per_block}
  shared_memory_per_core: {card.shared_memory_per_core}
  core_count: {card.cores} fpus_per_core: {card.fpus_per_core} clock_rate_ghz: {card.clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {card.bandwidth} l2_cache_size: {card.l2_cache} device_memory_size: {card.memory}
  cuda_compute_capability {{ major: {card.capability[0]} minor: {card.capability[1]} {feature} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true
  name: "{card.device_kind}"
  driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
  dnn_version: "{dnn[0]}.{dnn[1]}.{dnn[2]}"
  device_interconnect_info {{ active_links: {card.nvlinks} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: {dnn[0]} minor: {dnn[1]} patch: {dnn[2]} }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{card.device_kind}"
"""
"""The text form of XLA's ``GpuTargetConfigProto``, as in its own ``xla/backends/gpu/target_config/specs``."""

_CARDS: dict[jax.Device, Card] = {}


def described_devices(card: Card, hosts: int = 1, per_host: int = 1) -> list[jax.Device]:
    """Return devices to compile for, in the order of their hosts.

    Args:
      card: the GPU.
      hosts: the number of hosts.
      per_host: GPUs of each.

    Raises:
      InputError: the compiler is not installed, or XLA does not know such a card.
      RunError: JAX has started without its CUDA plugin.
    """
    reason = compiler_problem()
    if reason is not None:
        raise InputError(f"compiling for {card.name} {reason}")
    try:
        with cuda_plugin.quiet_without_driver(), _quiet_compiler():
            found = topologies.get_topology_desc(
                platform="cuda", target_config=target_text(card), topology=f"1x{hosts}x{per_host}"
            )
    except NotImplementedError as error:  # the plugin refuses to start where it finds no CUDA libraries
        raise RunError(
            f"JAX has started without its CUDA plugin, so it cannot compile for {card.name}: set "
            "JAX_PLATFORMS=cpu before JAX starts, so that it does not look for a GPU"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"XLA cannot compile for {card.name}: {why_not_compiled(error, card)}") from error
    devices = list(found.devices)
    _CARDS.update(dict.fromkeys(devices, card))
    return devices


def card_of(mesh: Mesh | AbstractMesh) -> Card | None:
    """Return the card that the devices of ``mesh`` describe; None for real devices.

    >>> card_of(Mesh(jax.devices()[:1], ("data",))) is None
    True
    """
    return None if isinstance(mesh, AbstractMesh) else _CARDS.get(mesh.devices.flat[0])


def compile_only(fn: Callable[..., Any], card: Card) -> Callable[..., Any]:
    """Return ``fn``, which may be jitted, as a function that can be lowered: a call raises InputError."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise InputError(
            f"this program is for a described {card.device_kind}, which can only be compiled for: use its "
            "train_step.lower(), or assemble it on a mesh of real devices (jax.devices())"
        )

    for name in ("lower", "trace", "eval_shape"):
        if hasattr(fn, name):
            setattr(refuse, name, getattr(fn, name))
    return refuse


def abstract_key(sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """Return the shape of a random key with a sharding."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding)


@contextlib.contextmanager
def _quiet_compiler() -> Iterator[None]:
    """Silence XLA's log, where its library is first loaded in the block. Errors are raised all the same."""
    before = os.environ.get(LOG_LEVEL)
    os.environ[LOG_LEVEL] = "3"
    try:
        yield
    finally:
        del os.environ[LOG_LEVEL]
        if before is not None:
            os.environ[LOG_LEVEL] = before


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Turn off JAX's compilation cache in the block: it stores such programs and cannot load them."""
    enabled = getattr(jax.config, "jax_enable_compilation_cache", True)
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX reads the setting once, at its first compilation
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def target_text(card: Card) -> str:
    """Return XLA's description of the card."""
    major = card.capability[0]
    return TARGET.format(
        card=card,
        dnn=CUDNN,
        feature="feature_extension: ACCELERATED_FEATURES" if major >= 9 else "",
        threads_per_core=1536 if card.capability in ((8, 6), (8, 9)) else 2048,
    )


def compiler_problem() -> str | None:
    """Return why this machine cannot compile for GPUs and how to change that; None if it can."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"needs Linux, and this is {platform.system()} on {platform.machine()}"
    wanted = jax.__version__
    installed = {
        f"jax-cuda{cuda}-{part}": _version(f"jax-cuda{cuda}-{part}")
        for cuda in ("12", "13")
        for part in ("plugin", "pjrt")
    }
    assemblers = [
        assembler
        for cuda, assembler in ASSEMBLERS.items()
        if all(installed[f"jax-cuda{cuda}-{part}"] == wanted for part in ("plugin", "pjrt"))
    ]
    if assemblers:
        if _has_toolkit() or any(_version(one) is not None for one in assemblers):
            return None
        return f"needs NVIDIA's assembler: pip install {assemblers[0]}"
    found = [f"{package} {version}" for package, version in installed.items() if version is not None]
    if not found:
        return f"needs XLA's GPU compiler, which is not installed: {_pip(wanted)}"
    return f"needs the CUDA plugin of jax {wanted}, and this is installed: {', '.join(found)}: {_pip(wanted)}"


def why_not_compiled(error: jax.errors.JaxRuntimeError, card: Card) -> str:
    """Return in one line why XLA refused a card or a program for it."""
    if "ptxas too old" in str(error):
        major, minor = card.capability
        assembler = ASSEMBLERS["12" if _version("jax-cuda12-plugin") is not None else "13"]
        return (
            f"NVIDIA's assembler does not know compute capability {major}.{minor}: install a newer one (pip "
            f"install -U {assembler}), or correct the card's capability"
        )
    if "Failed to parse GpuTargetConfigProto" in str(error):
        return "a figure of the card is out of range"
    return first_line(error)[:300]


def _has_toolkit() -> bool:
    return shutil.which("ptxas") is not None or (TOOLKIT / "bin" / "ptxas").exists()


def _pip(version: str) -> str:
    assembler = ASSEMBLERS["12"]
    return f"pip install jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version} '{assembler}>=12.9'"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
