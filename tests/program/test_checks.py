"""Bad input of every kind: one line, its exit code, and no file changed or left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fixtures_data
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from jax.sharding import Mesh

from jaxtrain import checkpoint, run
from jaxtrain import program as assembly
from jaxtrain.core.errors import InputError
from jaxtrain.data import Arrays, Normalise
from jaxtrain.data.prepare import prepare
from jaxtrain.experiment import find
from jaxtrain.models.layers import check_image
from jaxtrain.program import check_values, missing_values
from jaxtrain.program.device_limits import Limit
from jaxtrain.train import bad_examples, capacity, session

HEAD = f"""
import dataclasses, sys
import numpy as np
sys.path.insert(0, {str(ROOT / "tests")!r})
from tiny import EXPERIMENT as TINY
from jaxtrain import data, losses, models, sharding

class Stream:
    def __init__(self, fields): self.fields = fields
    def __len__(self): return 48
    def gather(self, ids): return {{name: array[ids] for name, array in self.fields.items()}}

class OneImage(Stream):
    def gather(self, ids): return {{name: array[0] for name, array in self.fields.items()}}

def fields(*shape, nan=None, label=None):
    rng = np.random.default_rng(0)
    image, labels = rng.random((48, *shape)).astype(np.float32), np.arange(48) % 4
    if nan is not None: image[nan] = np.nan
    if label is not None: labels[label] = 7
    return {{"image": image, "label": labels.astype(np.int32)}}

def change(source=None, **changes):
    small = {{"model": models.MLP(widths=(4,), classes=4), "preprocess": ()}}
    small |= {{"augment": (), "post_update": ()}}
    source = data.Arrays(fields(8, 8, 1)) if source is None else source
    return dataclasses.replace(TINY, **{{**small, "train": source, "test": source, **changes}})

class Fill:
    def __call__(self, batch, key=None):
        return {{**batch, "image": jnp.nan_to_num(batch["image"])}}

import jax.numpy as jnp
"""
OOM = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."


@dataclasses.dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
      says: what the line must hold: what is wrong, where, and what to do.
      experiment: a name or path, or the text of ``EXPERIMENT`` in a file of one's own.
      flags: of the command.
      code: 2, or 3 for what only shows while running.
      before: makes the circumstances.
      ran: did the run begin, so that its folder is there?
    """

    says: tuple[str, ...]
    experiment: str = "change()"
    flags: tuple[str, ...] = ()
    code: int = 2
    before: Callable[[pytest.MonkeyPatch], None] = lambda patch: None
    ran: bool = False


def flipped(patch: pytest.MonkeyPatch) -> None:
    """A prepared MNIST whose record 4 of the training file has one bit changed."""
    files = fixtures_data.tiny_files("mnist", 6)
    fixtures_data.patch_checksums(patch, "mnist", files)
    root = Path("tfds").absolute()
    folder = prepare("mnist", data_dir=root, source=fixtures_data.write(Path("originals"), files))
    patch.setenv("TFDS_DATA_DIR", str(root))
    path = next(folder.glob("*train*"))
    whole = bytearray(path.read_bytes())
    pngs = [found.start() for found in re.finditer(rb"\x89PNG", whole)]
    assert len(pngs) == 6
    whole[pngs[4] + 60] ^= 1
    path.write_bytes(whole)


def full_disk(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 4000))


def small_device(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(capacity, "limit_of", lambda mesh: Limit(10_000, "as the test says"))


def out_of_memory(patch: pytest.MonkeyPatch) -> None:
    real = assembly.assemble

    def assemble(*args, **options):
        program = real(*args, **options)

        def step(*args):
            raise jax.errors.JaxRuntimeError(OOM)

        step.trace = program.train_step.trace  # the loop reads the trace before the first call
        return dataclasses.replace(program, train_step=step)

    patch.setattr(session, "assemble", assemble)


def saved(**changes) -> Callable[[pytest.MonkeyPatch], None]:
    """The folder ``r`` of a run that was cut off after its first checkpoint, and is changed afterwards."""

    def before(patch: pytest.MonkeyPatch) -> None:
        assert run.main(["--experiment", own("change()"), "--workdir", "r"]) == 0
        Path("r/result.json").unlink()
        for path in Path("r").glob("checkpoints/*/manifest.json"):
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        if not changes:  # another model's checkpoint, in a folder that says it is this one's
            record = json.loads(Path("r/config.json").read_text())
            record["config"]["model.widths"] = "(5)"
            Path("r/config.json").write_text(json.dumps(record))

    return before


NEW = {"format": 99, "jaxtrain": "9.0"}
NAN = ("field 'image' of example 31 holds NaN or infinity", "data.Subset", "guard=skip")
CASES = {
    "misspelt experiment": Case(
        ("no experiment is called digit_cnn: did you mean digits_cnn?",), "digit_cnn"
    ),
    "override of the wrong type": Case(
        ("batch=many: expected int, such as 16",), flags=("--set", "batch=many")
    ),
    "batch not divisible": Case(
        ("batch 12 does not divide over 8 devices", "--set batch=8 or 16"), flags=("--set", "batch=12")
    ),
    "mesh larger than the devices": Case(
        ("--mesh data=16 needs 16 devices and there are 8", "--simulate-devices 16"),
        flags=("--mesh", "data=16"),
    ),
    "mesh smaller than the devices": Case(
        ("--mesh data=2 uses 2 of 8 devices and leaves 6 idle", "--devices 2"), flags=("--mesh", "data=2")
    ),
    "rule naming an unknown axis": Case(
        ("rules: no mesh axis is called 'daata': did you mean data?",),
        "change(rules=(sharding.Rule('head/kernel$', ('daata', None)),))",
    ),
    "data not prepared": Case(
        ("imagenet2012 cannot be downloaded automatically", "python -m jaxtrain prepare imagenet2012 --from"),
        str(ROOT / "experiments" / "imagenet_resnet50.py"),
    ),
    "corrupt record": Case(
        ("data set mnist: record 4 of ", "mnist-train.array_record", "python -m jaxtrain prepare mnist"),
        "change(data.TFDS('mnist'), model=models.MLP(widths=(4,), classes=10))",
        code=3,
        before=flipped,
    ),
    "no space": Case(
        (
            "two checkpoints need 176.91 KB (176,912 bytes)",
            "and 4.00 KB (4,000 bytes) are free on the disk of /",
            "--workdir",
        ),
        "change(model=models.MLP(widths=(8,), classes=4))",
        before=full_disk,
    ),
    "no permission": Case(
        ("mine0.py/r cannot be written", "(Not a directory)", "choose another --workdir"),
        flags=("--workdir", "mine0.py/r"),
    ),
    "checkpoint of another model": Case(
        (
            "r/checkpoints/000003 is of another model",
            "float32[4] there and float32[5] here",
            "restore the code of the run, or train anew with another --workdir or --new",
        ),
        flags=("--workdir", "r", "--set", "model.widths=5"),
        before=saved(),
    ),
    "device memory exhausted": Case(
        (
            "a device has no memory left, which was asked for 17.18 GB more",
            "try --set accumulate=2 or --set batch=8, or see what fits with: python -m jaxtrain plan",
        ),
        code=3,
        before=out_of_memory,
        ran=True,
    ),
    "state larger than the device": Case(
        ("a device has 10.00 KB and must hold 100.83 KB", "(parameters 1.06 KB", "--set placement=stream"),
        "change(data.Arrays(fields(16, 16, 1)), placement='device', "
        "model=models.MLP(widths=(1,), classes=4))",
        before=small_device,
    ),
    "NaN in the input, in memory": Case(("train: ", *NAN), "change(data.Arrays(fields(8, 8, 1, nan=31)))"),
    "NaN in the first batch of a stream": Case(
        ("train: field 'image' of 48 examples (", *NAN[1:]),
        "change(Stream(fields(8, 8, 1, nan=slice(None))), placement='stream', batch=48)",
    ),
    "NaN later in a stream": Case(
        ("loss is nan at step 5", "the update was not applied", NAN[0], "bad_batch.json", *NAN[1:]),
        "change(Stream(fields(8, 8, 1, nan=31)), placement='stream', batch=8, save_every=0.2, seed=1)",
        code=3,
        ran=True,
    ),
    "label out of range": Case(
        (
            "train: label 7 of example 31 in field 'label' is outside the model's 4 classes 0..3 (1 such)",
            "fix the",
        ),
        "change(data.Arrays(fields(8, 8, 1, label=31)))",
    ),
    "label out of range later in a stream": Case(
        ("train: label 7 of example 31 in field 'label'", "4 classes 0..3", "earlier checkpoints are kept"),
        "change(Stream(fields(8, 8, 1, label=31)), placement='stream', batch=8, seed=1)",
        code=3,
        ran=True,
    ),
    "image with its channels first": Case(
        ("image (16, 3, 32, 32) looks like [batch, channel, height, width]", ".transpose(0, 2, 3, 1)"),
        "change(data.Arrays(fields(3, 32, 32)), model=TINY.model)",
    ),
    "one image taken for many": Case(
        ("image has shape (16, 32, 3): CNN takes [batch, height", "add it with image[None]"),
        "change(data.Arrays(fields(32, 3)), model=TINY.model)",
    ),
    "a source that gives one image": Case(
        ("field 'image' has shape [32, 32, 3] for 2 examples: OneImage.gather must return", "np.stack"),
        "change(OneImage(fields(32, 32, 3)), model=TINY.model)",
    ),
    "text among the fields": Case(
        ("train: field 'name' has dtype <U1, which is not numeric", "leave the field out"),
        "change(data.Arrays({**fields(8, 8, 1), 'name': np.array(['a'] * 48)}))",
    ),
    "numbers that 32 bits do not hold": Case(
        ("train: field 'user' contains 1099511627823, and JAX stores int64 as int32", "smaller numbers"),
        "change(data.Arrays({**fields(8, 8, 1), 'user': np.arange(48) + 2**40}))",
    ),
    "checkpoint of a newer format": Case(
        ("r/checkpoints/000003 has format 99 and this version reads 1 and 2", "use the jaxtrain", "(9.0)"),
        flags=("--workdir", "r"),
        before=saved(**NEW),
    ),
}


def own(text: str) -> str:
    """A user's file that holds ``EXPERIMENT = text``; names and paths are left as they are."""
    if not text.startswith("change("):
        return text
    path = Path(f"mine{len(list(Path().glob('mine*.py')))}.py")  # one that no module was loaded from yet
    path.write_text(f"{HEAD}\nEXPERIMENT = {text}\n")
    return f"./{path}"


def everything() -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file() and path.suffix != ".pyc"
    }


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))


@pytest.mark.full("[NaN later in a stream]")
@pytest.mark.parametrize("name", CASES)
def test_bad_input_prints_one_line_and_leaves_nothing_behind(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    case.before(monkeypatch)
    words = ["--experiment", own(case.experiment), *case.flags]
    there = everything()
    capsys.readouterr()
    code, line = run.main(words), capsys.readouterr().err
    assert code == case.code, line
    assert line.count("\n") == 1 and line.startswith("jaxtrain.run: ") and "Traceback" not in line, line
    for part in case.says:
        assert part in line, line
    assert len(line) < 800
    left = everything()
    assert {path: left.get(path) for path in there} == there
    if case.ran:
        assert all(path.startswith("runs/") for path in left.keys() - there.keys())
    else:  # not even a folder; a run's own lock says who looked into it
        assert {path for path in left.keys() - there.keys() if not path.endswith("/.lock")} == set()
        assert not Path("runs").exists()
        assert run.main([*words, "--debug"]) == case.code
        assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_nan_is_reported_by_field_and_example() -> None:
    case = CASES["NaN later in a stream"]
    assert run.main(["--experiment", own(case.experiment), *case.flags]) == 3
    folder = next(Path("runs").glob("*/*"))
    found = json.loads((folder / "bad_batch.json").read_text())
    record = {"examples": [31], "what": "holds NaN or infinity", "made_by": "the source"}
    assert found["fields"] == {"image": record} and 31 in found["examples"]
    assert sorted(path.name for path in folder.glob("checkpoints/*")) == ["000003", "000004"]


@pytest.fixture
def assembled(mesh1: Mesh) -> Iterator[Callable[..., assembly.Program]]:
    """``assembled(text, batch=8)``: the program of a file's ``EXPERIMENT``, on one device."""
    made = []

    def assemble(text: str, **changes: Any) -> assembly.Program:
        experiment, _ = find(own(text)).load()
        made.append(assembly.assemble(dataclasses.replace(experiment, **changes), mesh1))
        return made[-1]

    yield assemble
    for program in made:
        program.close()


def test_filled_or_skipped_nan_is_no_error(assembled) -> None:
    gaps = "change(data.Arrays(fields(8, 8, 1, nan=31))"
    assert assembled(f"{gaps}, preprocess=(Fill(),))").notes == ()
    (note, *_) = assembled(f"{gaps}, guard='skip')").notes
    assert (
        note.startswith("train: field 'image' of example 31 holds NaN")
        and "(guard=skip trains all the same)" in note
    )
    assembled("change(Stream(fields(8, 8, 1, nan=slice(None))), placement='stream', guard='skip')")


def test_values_are_checked_in_chunks(monkeypatch) -> None:
    monkeypatch.setattr(missing_values, "CHUNK", 10)
    x = np.zeros((100, 3), np.float64)
    x[[7, 99], [2, 0]] = np.inf, np.nan
    found = missing_values.not_finite(
        {"x": x, "half": jnp.full(100, jnp.nan, jnp.bfloat16), "n": np.arange(100)}
    )
    assert found["x"].tolist() == [7, 99] and len(found["half"]) == 100 and found.keys() == {"x", "half"}


@pytest.mark.full("tests/program/test_checks.py::test_bad_input_prints_one_line_and_leaves_nothing_behind")
def test_label_broken_by_a_stage_is_reported_by_field_example_and_value(assembled) -> None:
    """The stages run with the step's own keys, so they spoil the same examples as in the compiled step."""

    def spoil(batch, key):
        hit = jax.random.bernoulli(key, 0.3, batch["label"].shape) if key is not None else False
        return {**batch, "label": jnp.where(hit, batch["label"] + 40, batch["label"])}

    program = assembled("change(holdout=16)", augment=(Normalise(), spoil))
    (found,) = bad_examples.locate(program, 2)
    state = program.init().replace(step=jnp.int32(1))
    _, metrics = program.train_step(state, program.train.batch(1), program.key)
    assert metrics["guard"].by_name()["labels_out_of_range"] == len(found.examples) > 0
    labels = program.experiment.train.gather(found.examples)["label"]
    assert set(found.examples) <= set(program.example_ids(2)) and (labels < 4).all()
    values = ", ".join(map(str, sorted(set(labels + 40))))
    assert f"is {values}, no class of 0..3, after augment and preprocess" in found.text
    assert bad_examples.locate(assembled("change()"), 2) == []


@pytest.mark.full("tests/program/test_checks.py::test_bad_input_prints_one_line_and_leaves_nothing_behind")
@pytest.mark.parametrize(
    ("changes", "limit", "fix"),
    [
        ("placement='device', batch=8", 12_000, "--set placement=stream"),
        ("placement='stream', batch=48", 9_000, "--set batch=25 is the largest"),
        ("placement='stream', batch=48, accumulate=2", 9_000, "--set batch=24 is the largest"),
        ("placement='stream', batch=8", 500, "needs 5 such devices or more"),
    ],
)
def test_check_memory_suggests_settings_that_fit(assembled, changes, limit, fix, monkeypatch) -> None:
    program = assembled(f"change({changes})")
    monkeypatch.setattr(capacity, "limit_of", lambda mesh: Limit(limit, ""))
    with pytest.raises(InputError, match=fix):
        capacity.check_memory(program)
    settings = re.findall(r"(batch|placement)=(\w+)", fix)
    if settings:
        changed = {name: int(value) if value.isdigit() else value for name, value in settings}
        capacity.check_memory(assembled(f"change({changes})", **changed))


def test_check_memory_suggests_fsdp(mesh8, monkeypatch) -> None:
    experiment, _ = find(own("change(placement='stream', batch=8)")).load()
    program = assembly.assemble(experiment, mesh8)
    monkeypatch.setattr(capacity, "limit_of", lambda mesh: Limit(2000, ""))
    with pytest.raises(InputError, match=r"--mesh fsdp=8 splits the state over the 8 devices"):
        capacity.check_memory(program)
    assert capacity.smaller_settings(program) == []
    program.close()


@pytest.mark.full("tests/program/test_checks.py::test_bad_input_prints_one_line_and_leaves_nothing_behind")
@pytest.mark.parametrize(
    ("batch", "accumulate", "advice"),
    [
        (16, 1, ["accumulate=2", "batch=8"]),
        (48, 2, ["accumulate=4", "batch=24"]),
        (9, 3, ["accumulate=9", "batch=3"]),
        (1, 1, []),
    ],
)
def test_advice_for_less_memory_divides(assembled, batch, accumulate, advice) -> None:
    program = assembled("change()", batch=batch, accumulate=accumulate)
    assert capacity.smaller_settings(program) == advice


def test_disk_check_counts_an_existing_checkpoint(assembled, monkeypatch) -> None:
    program = assembled("change()")
    size = checkpoint.space(program.init())
    assert size > sum(leaf.nbytes for leaf in jax.tree.leaves(program.init()))
    disk = lambda free: lambda path: shutil._ntuple_diskusage(10**9, 10**9, free)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", disk(2 * size))
    capacity.check_disk(program, Path("gone/r"))
    monkeypatch.setattr(shutil, "disk_usage", disk(2 * size - 1))
    with pytest.raises(InputError, match=f"{2 * size:,} bytes"):
        capacity.check_disk(program, Path("gone/r"))
    Path("r/checkpoints/000004").mkdir(parents=True)
    Path("r/checkpoints/000004/manifest.json").touch()
    capacity.check_disk(program, Path("r"))
    monkeypatch.setattr(shutil, "disk_usage", disk(size - 1))
    with pytest.raises(InputError, match="one more checkpoint needs"):
        capacity.check_disk(program, Path("r"))


@pytest.mark.parametrize(
    ("image", "preprocess", "words"),
    [
        (np.zeros((4, 3, 32, 32), np.float32), (), "looks like [channel, height, width]"),
        (np.full((4, 8, 8, 1), 200, np.uint8), (), "uint8 with values up to 200 and preprocess is empty"),
        (np.full((4, 8, 8, 1), 3000.0), (), "float64 with values up to 3000 and preprocess is empty"),
        (np.full((4, 8, 8, 1), 0.5), (Normalise(),), "up to 0.5, and Normalise divides them by 255"),
        (np.full((4, 28, 28, 1), 0.5), (), None),
        (np.full((4, 8, 8, 12), 0.5), (), None),  # of many spectral bands
        (np.full((4, 64, 64, 2), 0.5), (), None),
        (np.full((4, 3, 1000, 4), 0.5), (), None),
        (np.full((4, 8, 8, 3), 200, np.uint8), (Normalise(),), None),
        (np.full((4, 8, 8, 3), 3000.0), (Normalise(scale=4096.0),), None),
        (np.full((4, 50), 3000.0), (), None),  # "image" of no picture
    ],
)
def test_suspicious_images_are_noted(image, preprocess, words) -> None:
    experiment, _ = find(own("change()")).load()
    experiment = dataclasses.replace(experiment, preprocess=preprocess)
    found = check_values.image_notes(experiment, Arrays({"image": image}))
    assert len(found) == (words is not None) and (words or "") in "".join(found)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 12])
def test_shipped_models_accept_any_number_of_channels(channels) -> None:
    check_image(np.zeros((2, 16, 16, channels)), 2, "CNN")
    with pytest.raises(InputError, match="NCHW"):
        check_image(np.zeros((2, 3, 16, 16)), 2, "CNN")


@pytest.fixture
def nobody() -> Iterator[Path]:
    """An open folder of root's and a closed one in it, seen by a user whom permission bits hold back."""
    with tempfile.TemporaryDirectory() as theirs:
        Path(theirs).chmod(0o755)
        Path(theirs, "closed").mkdir(mode=0o700)
        os.seteuid(65534)
        try:
            yield Path(theirs)
        finally:
            os.seteuid(0)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("place", ["r", "closed/r", "closed"])
def test_folder_without_permission_is_rejected_at_once(place, nobody, capsys) -> None:
    code = run.main(["--experiment", str(ROOT / "tests" / "tiny.py"), "--workdir", str(nobody / place)])
    line = capsys.readouterr().err
    assert code == 2 and line.count("\n") == 1, line
    assert (
        f"{place} cannot be written" in line
        and "(Permission denied)" in line
        and "choose another --workdir" in line
    )
    os.seteuid(0)
    assert [path.name for path in nobody.rglob("*")] == ["closed"]


def test_finished_run_needs_no_writable_folder(monkeypatch) -> None:
    monkeypatch.setattr(
        tempfile, "TemporaryFile", lambda dir: (_ for _ in ()).throw(OSError(30, "Read-only"))
    )
    with pytest.raises(InputError, match=r"r cannot be written \(Read-only\) in /"):
        capacity.check_folder(Path("r"))
    Path("r").mkdir()
    Path("r/result.json").touch()
    capacity.check_folder(Path("r"))
