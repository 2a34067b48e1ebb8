"""Eight fake CPU devices in the one test process; tests of one device pass a mesh of one."""

from __future__ import annotations

import gc
import os
import platform
import signal
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

GPU = os.environ.get("JAXTRAIN_TEST_GPU") == "1"
TIERS = ("default", "full", "nightly")
TIER = os.environ.get("JAXTRAIN_TEST_TIER", "default")  # set by scripts/test --full and --nightly
os.environ["NO_COLOR"] = "1"
os.environ["COLUMNS"] = "100"
# In a shell's background, or under nohup, signals are ignored, and a child process inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
if not GPU:
    os.environ["JAX_PLATFORMS"] = "cpu"

ROOT = Path(__file__).resolve().parent.parent

# Many tests build the same program, in xdist workers, in processes of their own and in the next session:
# compile it once. Old versions' folders can be deleted.
CACHE = (
    ROOT / ".cache" / "tests" / f"jax-{version('jax')}-python-{'.'.join(platform.python_version_tuple()[:2])}"
)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# JAX writes an entry without a lock: who reads it half written compiles for itself, and says so.
os.environ.setdefault("PYTHONWARNINGS", "ignore:Error reading persistent compilation cache")
USER_CACHE = tempfile.TemporaryDirectory(prefix="jaxtrain-test-cache-")
os.environ["XDG_CACHE_HOME"] = USER_CACHE.name  # the tests use nothing of the tester's own

os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # as scripts/run sets it

# What a test runs is small and what it compiles is not: LLVM optimizes little, and in the default tier not
# at all, for 17 % less CPU time. (Shorter ways still, without fusion emitters, are not exact: 20 steps of a
# GPT in float64 on two meshes then differ by 5e-8.)
os.environ.setdefault(
    "XLA_FLAGS",
    f"--xla_backend_optimization_level={0 if TIER == 'default' else 1} "
    "--xla_cpu_parallel_codegen_split_count=1",
)

# Tracing makes many small objects that live on: looking through them all took 7 % of the contracts' time.
gc.set_threshold(50_000, 20, 100)

import jax  # noqa: E402 - after the environment is set
from fixtures_data import *  # noqa: E402, F403 - fixtures are found by name

from jaxtrain import sharding  # noqa: E402
from jaxtrain.sharding import rules as sharding_rules  # noqa: E402

if not GPU:
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

LONGEST = (
    "test_contracts",
    "test_install",
    "test_cli",
    "test_stop_and_resume",
    "test_distributed",
    "test_parallel",
    "test_loop",
    "test_real_data",
    "test_sharded_programs",
    "test_gpu_goldens",
    "test_end_to_end",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of longer tiers, and run the files that take longest first.

    GPU tests run only where they are asked for (``JAXTRAIN_TEST_GPU=1``), and then alone.
    """
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    for item in items:
        for tier in TIERS[TIERS.index(TIER) + 1 :]:
            if needs(item, tier):
                item.add_marker(pytest.mark.skip(reason=f"scripts/test --{tier} runs it"))
        if (item.get_closest_marker("gpu") is not None) != GPU:
            item.add_marker(pytest.mark.skip(reason="JAXTRAIN_TEST_GPU=1 runs the GPU tests, and only them"))


def needs(item: pytest.Item, tier: str) -> bool:
    """Whether ``item`` runs in ``tier`` and longer ones only.

    ``mark.full(*witnesses)`` names tests of the default tier that show the same promise. A witness in
    brackets is a case of the same parametrised test, which stays in the default tier.
    """
    _, bracket, case = item.nodeid.partition("[")
    return any(bracket + case not in mark.args for mark in item.iter_markers(tier))


@pytest.fixture(scope="session")
def mesh1():
    """A mesh of one device."""
    return sharding.make_mesh(jax.devices()[:1])


@pytest.fixture(scope="session")
def mesh8():
    """A mesh of all eight."""
    return sharding.make_mesh(jax.devices())


@pytest.fixture
def put_back(monkeypatch):
    """After the test, what ``parallel_cases.make`` changes: small arrays are split too, and the attention."""
    monkeypatch.setattr(sharding_rules, "SMALLEST", sharding_rules.SMALLEST)
    monkeypatch.setattr(jax.nn, "dot_product_attention", jax.nn.dot_product_attention)


@pytest.fixture
def python(tmp_path):
    """Run ``python ARGS`` in a fresh process and an empty folder: ``python("-m", "jaxtrain.run", ...)``."""

    def run(*args, devices: int = 1, cwd=tmp_path, **env) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, args)],
            cwd=cwd,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), **env},
            capture_output=True,
            text=True,
            check=False,
        )

    return run
