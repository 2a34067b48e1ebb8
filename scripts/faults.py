"""The fault suite: kills, damaged bytes, full disks, two writers, signals; what survives is a table.

A case is lost when the run cannot go on from its last complete checkpoint, and silently wrong when it goes on
and ends with other parameters than a run that nothing happened to. Both must be 0.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

EXPERIMENT = ROOT / "tests" / "tiny.py"
STEPS = 100
OFTEN = (
    "epochs=8",
    "eval_every=none",
    "log_every=1",
    "save_every=0.08",
    "max_to_keep=1",
)  # a save, a deletion a step
SOME = ("epochs=8", "eval_every=none", "log_every=1", "save_every=2")


class Case:
    """Counts of one kind of fault: every try is survived, lost or silently wrong.

    Args:
      name: what happens.
      ours: is it a promise of ours, or shown beside it?
    """

    def __init__(self, name: str, ours: bool = True) -> None:
        self.name, self.ours = name, ours
        self.tried = self.survived = self.lost = self.wrong = 0
        self.notes: list[str] = []

    def add(self, outcome: str, note: str = "") -> None:
        self.tried += 1
        setattr(self, outcome, getattr(self, outcome) + 1)
        if note:
            self.notes.append(note)


class Bench:
    """A folder for runs, compiled programs that they share, and the result of an undisturbed run."""

    def __init__(self, folder: Path, quick: bool = False) -> None:
        self.folder, self.number, self.quick = folder, 0, quick
        self.env = {**os.environ, "PYTHONUNBUFFERED": "1", "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
        self.env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(ROOT)}
        self.env["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        self._truth: dict[tuple[Path, tuple[str, ...]], dict[str, bytes]] = {}
        self.experiment = EXPERIMENT

    def fresh(self) -> Path:
        """The folder of another run; nothing is there yet."""
        self.number += 1
        return self.folder / f"run{self.number}"

    def start(self, run: Path, settings: tuple[str, ...], *words: str, **env: str) -> subprocess.Popen[str]:
        """``python -m jaxtrain.run`` in the background."""
        command = [
            sys.executable,
            "-m",
            "jaxtrain.run",
            "--experiment",
            str(self.experiment),
            "--workdir",
            str(run),
        ]
        for setting in settings:
            command += ["--set", setting]
        return subprocess.Popen(
            [*command, *words],
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, run: Path, settings: tuple[str, ...], *words: str, **env: str) -> tuple[int, str]:
        """The same, to its end: exit code and what it said."""
        process = self.start(run, settings, *words, **env)
        out, error = process.communicate()
        return process.returncode, out + error

    def truth(self, settings: tuple[str, ...]) -> dict[str, bytes]:
        """The final arrays of a run that nothing happened to."""
        which = self.experiment, settings
        if which not in self._truth:
            run = self.fresh()
            code, said = self.finish(run, settings)
            if code:
                raise SystemExit(f"the undisturbed run failed: {said}")
            self._truth[which] = arrays(run)
        return self._truth[which]

    def judge(self, case: Case, run: Path, settings: tuple[str, ...], code: int, said: str) -> None:
        """After a run has gone on to its end: survived, lost or wrong."""
        if code:
            case.add(
                "lost", f"exit code {code}: {said.strip().splitlines()[-1][:200] if said.strip() else ''}"
            )
        elif arrays(run) != self.truth(settings):
            case.add("wrong", f"other parameters in {run.name}")
        else:
            case.add("survived")


def arrays(run: Path) -> dict[str, bytes]:
    """The arrays of a run's newest checkpoint, bit for bit; none when that is not of the last step."""
    from jaxtrain import checkpoint

    with checkpoint.open(run) as saved:
        newest = saved.latest()
    if newest is None or newest.step != STEPS:
        return {}
    return {path: array.tobytes() for path, array in checkpoint.arrays(f"{run}:{STEPS}").items()}


def wait_for(process: subprocess.Popen[str], text: str) -> bool:
    """Read until a line begins with ``text``; False when the process ended before."""
    assert process.stdout is not None
    return any(line.startswith(text) for line in process.stdout)


def kills(bench: Bench) -> Iterator[Case]:
    """SIGKILL at any moment of training, half of them where every step saves and deletes."""
    chance = random.Random(0)
    for name, settings in (("SIGKILL while training", SOME), ("SIGKILL while saving and deleting", OFTEN)):
        case = Case(name)
        for _ in range(1 if bench.quick else 10):
            run, last = bench.fresh(), chance.randrange(2, STEPS - 5)
            process = bench.start(run, settings)
            if wait_for(process, f"step {last}/"):
                time.sleep(chance.random() * 0.05)
                process.kill()
            process.communicate()
            bench.judge(case, run, settings, *bench.finish(run, settings))
        yield case


def damage(bench: Bench) -> Iterator[Case]:
    """Flip a bit, zero a block or cut off the end, all over the files of a checkpoint, and restore it."""
    from jaxtrain.core.errors import InputError, RunError

    chance, whole = random.Random(0), large(bench.fresh())
    truth, newest = arrays(whole), whole / "checkpoints" / f"{STEPS:06d}"
    files = sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size)
    sizes = [p.stat().st_size for p in files]
    for name, break_it in (("one bit flipped", flip), ("a block zeroed", zero), ("the end cut off", cut)):
        case, alone = Case(f"{name} in a checkpoint"), Case("  the same, read by Orbax alone", ours=False)
        for number in range(2 * len(files) if bench.quick else 120):
            run = bench.fresh()
            shutil.copytree(whole, run)
            # Half of them anywhere, and half in each of the files in turn.
            hit = chance.choices(files, sizes)[0] if number % 2 else files[number // 2 % len(files)]
            target = run / hit.relative_to(whole)
            before = target.read_bytes()
            target.write_bytes(break_it(before, chance))
            if target.read_bytes() == before:  # it was zero already
                shutil.rmtree(run)
                continue
            try:
                got = arrays(run)
                case.add("survived" if got == truth else "wrong", "" if got == truth else str(target.name))
            except (InputError, RunError):
                case.add("survived")  # told, and nothing used
            alone.add("wrong" if orbax(run) not in (truth, None) else "survived")
            shutil.rmtree(run)
        yield from (case, alone)


def large(run: Path) -> Path:
    """A run's folder with a checkpoint of 4 MB; arrays of a few numbers have no files of their own."""
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
    """A run whose newest checkpoint is damaged: refused, and with --resume last-good it goes on exactly."""
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
            case.add("wrong" if code == 0 else "lost", f"exit code {code}, not told of the damage")
            continue
        bench.judge(case, run, SOME, *bench.finish(run, SOME, "--resume", "last-good"))
    yield case


def signals(bench: Bench) -> Iterator[Case]:
    """SIGTERM while compiling, stepping, evaluating and saving: exit 143, and the run goes on exactly."""
    case = Case("SIGTERM while compiling, stepping, evaluating, saving")
    looks = ("epochs=8", "eval_every=0.08", "log_every=1", "save_every=2")
    for settings, text in (
        (SOME, "starting"),
        (SOME, "step 40/"),
        (looks, "step 30/"),
        (OFTEN, "step 50/"),
    ):
        run = bench.fresh()
        process = bench.start(run, settings)
        wait_for(process, text)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate()
        if process.returncode != 143:
            case.add("lost", f"exit code {process.returncode} after {text}: {error.strip()[-200:]}")
            continue
        bench.judge(case, run, settings, *bench.finish(run, settings))
    yield case


def writers(bench: Bench) -> Iterator[Case]:
    """A second run in the same folder: refused, and the first is not disturbed."""
    case, run = Case("two runs in one folder"), bench.fresh()
    first = bench.start(run, SOME)
    wait_for(first, "step 5/")
    first.send_signal(signal.SIGSTOP)  # or it has ended before the second one is there
    code, said = bench.finish(run, SOME)
    first.send_signal(signal.SIGCONT)
    out, error = first.communicate()
    if code != 2 or "in use" not in said:
        case.add("wrong", f"the second run ended with {code}: {said[-200:]}")
    else:
        bench.judge(case, run, SOME, first.returncode, out + error)
    yield case


def full_disk(bench: Bench) -> Iterator[Case]:
    """A disk without space for the next checkpoint: exit 3, and with space again the run goes on exactly."""
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
    """The data folder goes away in mid-run: exit 3, and when it is back the run goes on exactly."""
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


def one_of_two(bench: Bench) -> Iterator[Case]:
    """One of two processes killed: the other ends too, and the run goes on as one process."""
    case, run = Case("one of two processes killed"), bench.fresh()
    command = [
        sys.executable,
        str(ROOT / "scripts" / "launch_local.py"),
        "-n",
        "2",
        "--devices-per-process",
        "1",
    ]
    command += ["--", "python", "-m", "jaxtrain.run", "--experiment", str(EXPERIMENT), "--workdir", str(run)]
    for setting in SOME:
        command += ["--set", setting]
    launcher = subprocess.Popen(
        command, env=bench.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(launcher, "[0] step 60/")
    for line in subprocess.check_output(["ps", "-eo", "pid,args"], text=True).splitlines():
        if str(run) in line and "--process-id 1" in line and "launch_local" not in line:
            os.kill(int(line.split()[0]), signal.SIGKILL)
    launcher.communicate()
    code, said = bench.finish(run, SOME, "--simulate-devices", "2")
    if code or not re.search(r"resuming at step \d+/100", said):
        case.add("lost", f"exit code {code}: {said.strip()[-200:]}")
    else:  # other processes sum in another order: equal but for rounding
        case.add("survived")
    yield case


SUITES: dict[str, Callable[[Bench], Iterator[Case]]] = {
    "kills": kills,
    "damage": damage,
    "fallback": fallback,
    "signals": signals,
    "writers": writers,
    "full_disk": full_disk,
    "one_of_two": one_of_two,
    "unplugged": unplugged,
}


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Nothing reaches stderr: what Orbax's threads say of damaged files is what the table tells."""
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), 2)
        try:
            yield
            gc.collect()  # coroutines that were left behind speak when they go
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def told(cases: Iterator[Case]) -> Iterator[Case]:
    """The cases, carried out unheard."""
    while True:
        with unheard():
            case = next(cases, None)
        if case is None:
            return
        yield case


def main() -> int:
    """The command line; 0 when nothing was lost or silently wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", metavar="NAME,...", help=f"of {', '.join(SUITES)}")
    parser.add_argument("--quick", action="store_true", help="kills, damage and fallback, a few of each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    args = parser.parse_args()
    chosen = args.only.split(",") if args.only else list(SUITES)[: 3 if args.quick else None]
    if unknown := [name for name in chosen if name not in SUITES]:
        parser.error(f"{unknown[0]} is none of {', '.join(SUITES)}")
    found, began = list[Case](), time.monotonic()
    print(f"{'fault':<52}{'tried':>7}{'survived':>10}{'lost':>6}{'silently wrong':>16}")
    with tempfile.TemporaryDirectory(prefix="jaxtrain-faults-") as folder:
        bench = Bench(Path(folder), args.quick)
        bench.truth(SOME)
        for name in chosen:
            for case in told(SUITES[name](bench)):
                found.append(case)
                print(f"{case.name:<52}{case.tried:>7}{case.survived:>10}{case.lost:>6}{case.wrong:>16}")
                for note in case.notes:
                    print(f"  {note}")
    if args.json:
        about = {"date": datetime.date.today().isoformat(), "seconds": round(time.monotonic() - began)}
        rows = [vars(case) for case in found]
        args.json.write_text(
            json.dumps({**about, "command": "scripts/faults", "cases": rows}, indent=1) + "\n"
        )
    return 1 if any(case.lost or case.wrong for case in found if case.ours) else 0


if __name__ == "__main__":
    sys.exit(main())
