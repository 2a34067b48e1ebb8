"""``python -m jaxtrain verify``: equal runs pass, and every kind of difference is found."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import numpy as np
import pytest

from jaxtrain import __main__ as commands
from jaxtrain.cli import verify_compare
from jaxtrain.core.errors import RunError

TINY = str(Path(__file__).parents[1] / "tiny.py")
# The stage is traced once in each process, and draws another number each time.
NONDETERMINISTIC = f"""
    '''An experiment that does not resume bit-for-bit.'''
    import dataclasses, importlib.util, os
    spec = importlib.util.spec_from_file_location("tiny_again", {TINY!r})
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)

    def noise(batch, key):
        return batch | {{"image": batch["image"] * (1 + int.from_bytes(os.urandom(2), "big") / 2**18)}}

    stages = tiny.EXPERIMENT.preprocess
    EXPERIMENT = dataclasses.replace(tiny.EXPERIMENT, preprocess=(*stages, noise))
"""


def refused(capsys, *args) -> tuple[int, str]:
    code = commands.main(["verify", *map(str, args)])
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return code, error


@pytest.mark.full("tests/train/test_loop.py::test_stop_and_resume_is_bitwise_the_straight_run")
def test_a_killed_run_resumes_bit_for_bit(capfd):
    assert commands.main(["verify", "--experiment", TINY, "--steps", "6"]) == 0
    out = capfd.readouterr().out
    assert "killed after the checkpoint of step 3" in out and "verified: bit-for-bit identical" in out
    assert "params       the same: 5 arrays\n" in out and "the same in 6 records" in out


@pytest.mark.full("tests/train/test_distributed.py::test_two_processes_train_as_one_device")
def test_two_processes_and_another_mesh(capfd):
    words = ["--experiment", TINY, "--steps", "4", "--simulate-devices", "4"]
    assert commands.main(["verify", *words, "--processes", "2"]) == 0
    assert commands.main(["verify", *words, "--against-mesh", "data=2,fsdp=2"]) == 0
    assert capfd.readouterr().out.count("verified: equal within 1e-05") == 2


@pytest.mark.full("tests/cli/test_verify.py::test_arrays_are_compared_bit_for_bit_or_within_a_tolerance")
def test_a_nondeterministic_run_is_found(tmp_path, capfd):
    path = tmp_path / "nondeterministic.py"
    path.write_text(textwrap.dedent(NONDETERMINISTIC))
    assert commands.main(["verify", "--experiment", str(path), "--steps", "4"]) == 3
    assert "NOT the same: params/" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--steps", "3"), "--steps 3: give an even number, at least 2"),
        (("--steps", "0"), "give an even number"),
        (("--tolerance", "nan"), "--tolerance nan: give a number in [0, 1)"),
        (("--processes", "2"), "add --simulate-devices 8"),
        (("--processes", "2", "--simulate-devices", "3"), "must be a multiple of it"),
        (("--process-id", "0"), "give only --processes N"),
        (("--set", "batch=x"), "expected int"),
    ],
)
def test_bad_input_is_one_line(args, message, capsys):
    code, error = refused(capsys, "--experiment", TINY, *args)
    assert code == 2 and message in error


@pytest.mark.full("tests/cli/test_verify.py::test_bad_input_is_one_line")
def test_an_error_of_a_process_is_reported_in_one_line(capsys):
    assert (
        commands.main(["verify", "--experiment", TINY, "--mesh", "model=3", "--simulate-devices", "2"]) == 2
    )
    error = capsys.readouterr().err
    assert error.startswith("jaxtrain verify: --mesh model=3 needs 3 devices") and error.count("\n") == 1


def write_ids(folder: Path, phase: str, ids: dict[int, list[int]], process: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"step": step, "ids": some}) + "\n" for step, some in ids.items()]
    (folder / f"{phase}-{process}.jsonl").write_text("".join(lines))


def test_examples_are_compared_step_by_step(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    write_ids(one, "straight", {1: [0, 1], 2: [2, 3]})
    write_ids(other, "killed", {1: [0, 1]})
    write_ids(other, "resumed", {2: [2, 3]})
    assert verify_compare._compare_ids(one, other, 2) == "the same in 2 steps"
    write_ids(other, "resumed", {2: [3, 2]})
    with pytest.raises(
        RunError, match=r"step 2 trained on the examples \[2, 3\], and in phase resumed on \[3, 2\]"
    ):
        verify_compare._compare_ids(one, other, 2)
    write_ids(other, "resumed", {2: [3]})
    write_ids(other, "resumed", {2: [2]}, process=1)  # each process has its own rows
    verify_compare._compare_ids(one, other, 2)
    write_ids(other, "resumed", {2: [2], 3: [4]}, process=1)
    with pytest.raises(RunError, match=r"trained the steps \[2, 3\], not 2 to 2"):
        verify_compare._compare_ids(one, other, 2)
    write_ids(other, "killed", {})
    with pytest.raises(RunError, match="no step"):
        verify_compare._compare_ids(one, other, 2)


def test_arrays_are_compared_bit_for_bit_or_within_a_tolerance():
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    b = a.copy()
    assert verify_compare._distance("p", a, b, 0.0) == 0
    b[1, 0] = np.nextafter(b[1, 0], 9, dtype=np.float32)
    with pytest.raises(
        RunError, match=r"p: 1 of 6 elements differ .* first at \[1, 0\]: .*3\.0.* and .*3\.0"
    ):
        verify_compare._distance("p", a, b, 0.0)
    assert 0 < verify_compare._distance("p", a, b, 1e-5) < 1e-6
    with pytest.raises(RunError, match="differ"):
        verify_compare._distance("p", a, b + 1, 1e-5)
    with pytest.raises(RunError, match="differ"):
        verify_compare._distance("p", a, b * np.float32(np.nan), 1e-5)
    nan, zero = np.float32([np.nan]), np.float32([0.0])
    assert verify_compare._distance("p", nan, nan.copy(), 0.0) == 0
    with pytest.raises(RunError):  # equal numbers, different bits
        verify_compare._distance("p", zero, -zero, 0.0)


def test_records_are_compared_by_step_and_name(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, loss in ((one, 0.5), (other, 0.5000001)):
        folder.mkdir()
        record = {"step": 1, "epoch": 0.1, "train/loss": loss, "examples_per_second": loss}
        (folder / "metrics.jsonl").write_text(json.dumps(record) + '\n{"step": 1, "test/loss": 2}\n')
    with pytest.raises(RunError, match=r"train/loss of step 1 is 0\.5 in one run and 0\.5000001"):
        verify_compare._compare_metrics(one, other, 1, 0.0)
    assert verify_compare._compare_metrics(one, other, 1, 1e-5) == "the same in 1 records"
    with pytest.raises(RunError, match="train/loss of step 2 is None"):
        verify_compare._compare_metrics(one, other, 2, 1e-5)
