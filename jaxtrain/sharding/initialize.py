"""Join the processes of a run: read flags or the cluster, rendezvous, then ``jax.distributed.initialize``."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

import jax

from jaxtrain.core.errors import InputError, RunError
from jaxtrain.core.text import first_line
from jaxtrain.sharding import rendezvous

COORDINATOR = "127.0.0.1:29400"
CLUSTERS = "SLURM (srun), Open MPI 4 (mpirun) and Kubernetes (a Job with completionMode Indexed, or a JobSet)"
PROXIES, NO_PROXY = ("grpc_proxy", "https_proxy", "http_proxy"), "no_grpc_proxy"


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    auto: bool = False,
    timeout: float = 60.0,
    *,
    warn: Callable[[str], None],
) -> None:
    """Join the other processes of this run; no effect with one process. Call it before any use of JAX.

    Args:
      coordinator: ``HOST:PORT`` on the machine of process 0, which listens at that address only; None is port
        29400 of this machine's loopback.
      processes: how many there are.
      process_id: which of them this is, from 0.
      auto: get all three from SLURM, Open MPI or Kubernetes.
      timeout: seconds to wait for the others.
      warn: called with a line for the user.

    Raises:
      InputError: values that are missing, wrong, or differ between the processes; JAX is in use already.
      RunError: another process is missing after ``timeout``.
    """
    explicit = (coordinator, processes, process_id) != (None, None, None)
    devices = None
    if auto and explicit:
        raise InputError(
            "--distributed auto finds the processes itself: remove it, or remove --coordinator, "
            "--processes and --process-id"
        )
    if auto:
        found = _detect(timeout, warn)
        if found is None:
            return
        coordinator, processes, process_id, devices = found
    elif not explicit:
        return
    if processes is None or process_id is None:
        missing = "--processes" if processes is None else "--process-id"
        raise InputError(f"{missing} is missing: give both --processes and --process-id")
    if processes < 1:
        raise InputError(f"--processes {processes}: give at least 1")
    if not 0 <= process_id < processes:
        raise InputError(
            f"--process-id {process_id} of --processes {processes}: ids are 0 to one less than the processes"
        )
    if processes == 1:
        return
    if jax.distributed.is_initialized() or in_use():
        raise InputError(
            "cannot join processes: this one already uses JAX's devices, or has joined (call start first)"
        )
    address = rendezvous.meet(coordinator or COORDINATOR, processes, process_id, timeout, warn)
    _initialize(address, processes, process_id, devices, timeout)


def _detect(timeout: float, warn: Callable[[str], None]) -> tuple[str, int, int, list[int] | None] | None:
    """Return coordinator, processes, process id and devices as JAX detects them in the environment.

    None when JAX has joined the processes too: a release without a separate function for detection.
    """
    arguments = (os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, int(timeout))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a missing kubernetes package; _hint says so too
            try:
                from jax._src.clusters import ClusterEnv

                found = ClusterEnv.auto_detect_unset_distributed_params(*arguments)
            except (ImportError, AttributeError, TypeError):
                jax.distributed.initialize(initialization_timeout=int(timeout))
                return None
    except Exception as error:  # each cluster's interface raises its own types
        text = " ".join(str(error).split())
        raise InputError(f"--distributed auto: {text}; it looks for {CLUSTERS}{_hint()}") from error
    address, processes, process_id, devices = found
    if address is None or processes is None or process_id is None:
        raise InputError(
            f"--distributed auto looks for {CLUSTERS} and found none{_hint()}: start it there, or give "
            "--coordinator HOST:PORT, --processes N and --process-id I"
        )
    return _bracketed(address), processes, process_id, _devices(devices, process_id, warn)


def _hint() -> str:
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return " (in Kubernetes it needs the package: pip install kubernetes)"
    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        return " (Open MPI 5 does not say where process 0 is)"
    if "SLURM_JOB_ID" in os.environ:
        return " (this is a SLURM job, and srun has not started this process)"
    return ""


def _devices(found: Any, process_id: int, warn: Callable[[str], None]) -> list[int] | None:
    """Return the local devices that this process uses; None means all, or JAX_LOCAL_DEVICE_IDS.

    Under SLURM and Open MPI, JAX expects one process per GPU and would leave other GPUs idle.
    """
    if found is None or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    if "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ","):
        return [0]  # SLURM assigns each process its own GPU (--gpus-per-task), with number 0
    here = re.fullmatch(r"(\d+)(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if here and here[1] == "1":
        return None
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if here and gpus.isdigit() and int(here[1]) < int(gpus) and process_id == 0:
        warn(
            f"a node has {gpus} GPUs and {here[1]} processes, which use one each, so GPUs are idle: use "
            f"--ntasks-per-node={gpus}, or 1 for one process with all of them"
        )
    return list(found)


def _initialize(address: str, processes: int, process_id: int, devices: Any, timeout: float) -> None:
    with contextlib.suppress(AttributeError):  # a release without it
        # JAX's handler catches SIGTERM and does nothing: it would not end the process outside training.
        jax.config.update("jax_enable_preemption_service", False)
    _bypass_proxies(address)
    try:
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=processes,
            process_id=process_id,
            local_device_ids=devices,
            cluster_detection_method="deactivate",  # or a surrounding SLURM job chooses one device
            initialization_timeout=max(10, int(timeout)),
            coordinator_bind_address=address,
        )
    except RuntimeError as error:
        raise RunError(
            f"process {process_id}: JAX cannot join {processes} processes at {address}: {first_line(error)}"
        ) from error
    _exit_on_uncaught_error()


def _bypass_proxies(address: str) -> None:
    """Exempt process 0 from the environment's proxies: gRPC would connect through one and wait for ever."""
    if not any(name in os.environ for name in PROXIES):
        return
    exempt = os.environ.get(NO_PROXY, os.environ.get("no_proxy", ""))
    host, _ = rendezvous.parse(address)
    os.environ[NO_PROXY] = ",".join(filter(None, (exempt, host)))


def _exit_on_uncaught_error() -> None:
    """End the process after an uncaught error; without this, JAX waits minutes for the other processes."""
    show = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        show(kind, error, trace)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130 if issubclass(kind, KeyboardInterrupt) else 1)

    sys.excepthook = hook


def in_use() -> bool:
    """Return whether this process has started JAX's backends; after that it cannot join other processes."""
    try:
        from jax._src import xla_bridge

        return xla_bridge.backends_are_initialized()
    except (ImportError, AttributeError):  # private; JAX itself raises a moment later
        return False


def _bracketed(address: str) -> str:
    """Add the brackets that Open MPI's IPv6 addresses lack."""
    host, _, port = address.rpartition(":")
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else address
