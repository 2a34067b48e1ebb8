"""What test_distributed.py runs in each of two processes: the float64 cases, written by process 0."""

import sys
from pathlib import Path

import jax
import numpy as np
import parallel_cases as cases

from jaxtrain.cli import devices
from jaxtrain.sharding import multihost


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    port, index, folder, *wanted = sys.argv[1:]
    devices.simulate_devices(4)
    multihost.start(f"127.0.0.1:{port}", 2, int(index), warn=print)
    for case in wanted:
        name, mesh = case.split("/")
        arrays, ids = cases.train(cases.make(name, mesh))
        if multihost.is_process_0():
            np.savez(Path(folder) / f"{case.replace('/', '-')}.npz", ids=ids, **arrays)
    multihost.barrier("end")


if __name__ == "__main__":
    main()
