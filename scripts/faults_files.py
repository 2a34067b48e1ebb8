"""Faults of files and disks: damaged checkpoints, a full disk, data that disappears."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from faults_bench import EXPERIMENT, SOME, STEPS, Bench, Case, arrays, wait_for


def damage(bench: Bench) -> Iterator[Case]:
    """Flip a bit, zero a block or cut off the end, all over the files of a checkpoint, and restore it."""
    from jaxtrain.core.errors import InputError, RunError

    chance, intact = random.Random(0), large(bench.fresh())
    truth, newest = arrays(intact), intact / "checkpoints" / f"{STEPS:06d}"
    files = sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size)
    sizes = [p.stat().st_size for p in files]
    for name, break_it in (("one bit flipped", flip), ("a block zeroed", zero), ("the end cut off", cut)):
        case, alone = Case(f"{name} in a checkpoint"), Case("  the same, read by Orbax alone", ours=False)
        for number in range(2 * len(files) if bench.quick else 120):
            run = bench.fresh()
            shutil.copytree(intact, run)
            # Half of them anywhere, and half in each of the files in turn.
            hit = chance.choices(files, sizes)[0] if number % 2 else files[number // 2 % len(files)]
            target = run / hit.relative_to(intact)
            before = target.read_bytes()
            target.write_bytes(break_it(before, chance))
            if target.read_bytes() == before:  # it was zero already
                shutil.rmtree(run)
                continue
            try:
                got = arrays(run)
                case.add("survived" if got == truth else "wrong", "" if got == truth else str(target.name))
            except (InputError, RunError):
                case.add("survived")  # reported, and nothing used
            alone.add("wrong" if orbax(run) not in (truth, None) else "survived")
            shutil.rmtree(run)
        yield from (case, alone)


def large(run: Path) -> Path:
    """A run's folder with a checkpoint of 4 MB; arrays of a few numbers get no separate files."""
    import jax
    import numpy as np

    from jaxtrain import checkpoint
    from jaxtrain.core.types import State

    rng = np.random.default_rng(0)
    params = {f"kernel{i}": rng.normal(size=(512, 512)).astype(np.float32) for i in range(4)}
    with checkpoint.open(run) as saved:
        saved.save(STEPS, jax.device_put(State(np.int32(STEPS), params, {}, {})))
    return run


def orbax(run: Path) -> dict[str, bytes] | None:
    """The arrays of a checkpoint as Orbax reads them, None where it says that it cannot."""
    import numpy as np
    from orbax.checkpoint import v1 as ocp

    try:
        found = ocp.load(run / "checkpoints" / f"{STEPS:06d}" / "state")
    except Exception:  # it has many kinds
        return None
    return {path: np.asarray(leaf).tobytes() for path, leaf in found.items()}


def flip(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :]


def zero(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(max(1, len(data) - 4096))
    return (data[:place] + bytes(4096) + data[place + 4096 :])[: len(data)]


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def fallback(bench: Bench) -> Iterator[Case]:
    """A run whose newest checkpoint is damaged: rejected, and with --resume last-good it resumes exactly."""
    case = Case("newest checkpoint damaged, --resume last-good")
    chance = random.Random(1)
    for _ in range(1 if bench.quick else 3):
        run = bench.fresh()
        process = bench.start(run, SOME)
        wait_for(process, "step 80/")
        process.kill()
        process.communicate()
        newest = max(run.glob("checkpoints/[0-9]*/manifest.json")).parent
        target = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        target.write_bytes(flip(target.read_bytes(), chance))
        code, said = bench.finish(run, SOME)
        if code != 3 or "--resume" not in said:
            case.add("wrong" if code == 0 else "lost", f"exit code {code}, the damage is not reported")
            continue
        bench.judge(case, run, SOME, *bench.finish(run, SOME, "--resume", "last-good"))
    yield case


def full_disk(bench: Bench) -> Iterator[Case]:
    """A disk without space for the next checkpoint: exit 3, and with space again the run resumes exactly."""
    case, disk = Case("disk full (tmpfs)"), bench.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        case.notes.append("not tried: a tmpfs cannot be mounted here")
        yield case
        return
    try:
        run, ballast = disk / "run", disk / "ballast"
        process = bench.start(run, SOME)
        wait_for(process, "step 30/")
        with contextlib.suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
        _, error = process.communicate()
        if process.returncode != 3 or len(error.strip().splitlines()) != 1:
            case.add("lost", f"exit code {process.returncode}: {error.strip()[-300:]}")
        else:
            ballast.unlink()
            bench.judge(case, run, SOME, *bench.finish(run, SOME))
    finally:
        subprocess.run(["umount", str(disk)], capture_output=True, check=False)
    yield case


FILES = '''"""Examples that are in a file each."""

import dataclasses
from pathlib import Path

import numpy as np

from jaxtrain import data, losses, models, optim
from jaxtrain.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Files:
    folder: str = str(Path(__file__).parent / "examples")

    def __len__(self):
        return 64

    def gather(self, ids):
        read = [(Path(self.folder) / f"{i}.bin").read_bytes() for i in ids]
        image = np.frombuffer(b"".join(read), np.uint8).reshape(len(read), 8, 8, 1)
        return {"image": image, "label": (np.asarray(ids) % 4).astype(np.int32)}


EXPERIMENT = Experiment(
    model=models.MLP(widths=(8,), classes=4),
    train=Files(),
    test=Files(),
    loss=losses.CrossEntropy(),
    optimizer=optim.SGD(lr=0.1),
    preprocess=(data.Normalise(),),
    batch=16,
    epochs=25,
    placement="stream",
)
'''


def unplugged(bench: Bench) -> Iterator[Case]:
    """The data folder goes away in mid-run: exit 3, and when it is back the run resumes exactly."""
    import numpy as np

    case, settings = Case("data folder unplugged in mid-run"), SOME[1:]
    examples = bench.folder / "examples"
    examples.mkdir()
    for i in range(64):
        image = np.random.default_rng(i).integers(0, 255, (8, 8, 1)).astype(np.uint8)
        # Not np.save: np.load in two threads at once can fail in CPython 3.11 ("AST constructor recursion").
        (examples / f"{i}.bin").write_bytes(image.tobytes())
    bench.experiment = bench.folder / "files.py"
    bench.experiment.write_text(FILES)
    for workers in ("workers=0", "workers=1"):
        run = bench.fresh()
        process = bench.start(run, (*settings, workers))
        wait_for(process, "step 30/")
        examples.rename(bench.folder / "gone")
        _, error = process.communicate()
        (bench.folder / "gone").rename(examples)
        if process.returncode != 3 or len(error.strip().splitlines()) != 1 or ".bin" not in error:
            case.add("lost", f"exit code {process.returncode}: {error.strip()[-300:]}")
            continue
        bench.judge(case, run, settings, *bench.finish(run, settings))
    bench.experiment = EXPERIMENT
    yield case
