"""The commands as a user types them: what they print and what they refuse."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from tiny import EXPERIMENT

from jaxtrain import __main__ as commands
from jaxtrain import checkpoint, run
from jaxtrain.cli import command_line
from jaxtrain.data.prepare import download
from jaxtrain.train import environment
from jaxtrain.train.run_folder import RunFolder

TINY = str(Path(__file__).parents[1] / "tiny.py")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))


def train(*args) -> int:
    return run.main(["--experiment", TINY, *args])


def refused(capsys, code: int, expected: int = 2) -> str:
    """Check the exit code; returns the error, which must be one line."""
    error = capsys.readouterr().err
    assert code == expected, error
    assert error.count("\n") == 1 and "Traceback" not in error, error
    return error


def user_file(tmp_path, text: str) -> str:
    path = tmp_path / f"mine{len(list(tmp_path.glob('mine*.py')))}.py"
    path.write_text(
        "import dataclasses, numpy as np\nfrom jaxtrain import data, models, losses, optim\n" + text
    )
    return str(path)


def leaves(folder) -> dict[str, np.ndarray]:
    """Read all arrays of the newest checkpoint, without the experiment."""
    from orbax.checkpoint import v1 as ocp

    with checkpoint.open(Path(folder)) as saved:
        newest = saved.latest()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Orbax warns without shardings
        return {k: np.asarray(v) for k, v in ocp.load(newest.folder / "state").items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for path, value in a.items():
        np.testing.assert_array_equal(value, b[path], err_msg=path)


def test_run_twice_then_new_then_evaluate(capsys):
    assert train("--workdir", "r", "--set", "save_every=0.5") == 0
    out = capsys.readouterr().out
    assert re.search(r"test, last step +loss \d\.\d+  accuracy \d+\.\d\d %", out)
    result = json.loads(Path("r/result.json").read_text())
    assert train("--workdir", "r") == 0
    again = capsys.readouterr().out
    assert "this run is finished" in again and f"accuracy {100 * result['test']['accuracy']:.2f} %" in again
    assert train("--workdir", "r", "--new") == 0
    assert json.loads(Path("r-2/result.json").read_text())["test"] == result["test"]
    capsys.readouterr()
    assert commands.main(["evaluate", "--experiment", TINY, "--workdir", "r", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == result["test"]["accuracy"] and found["examples"] == 50
    assert found["step"] == 13 and len(found["recall"]) == 4
    assert commands.main(["evaluate", "--experiment", TINY, "--workdir", "r", "--checkpoint", "7"]) == 0
    assert "step 7, test, 50 examples" in capsys.readouterr().out


def test_evaluate_refuses_missing_runs_checkpoints_and_splits(capsys):
    assert "holds no run" in refused(capsys, commands.main(["evaluate", "--workdir", "nowhere"]))
    assert train("--workdir", "r", "--set", "eval_every=none") == 0
    capsys.readouterr()
    code = commands.main(["evaluate", "--experiment", TINY, "--workdir", "r", "--checkpoint", "5"])
    assert "give best, latest or a saved step (13)" in refused(capsys, code)
    code = commands.main(["evaluate", "--experiment", TINY, "--workdir", "r", "--split", "valid"])
    assert "has no valid split" in refused(capsys, code)


@pytest.mark.full("tests/cli/test_cli.py::test_evaluate_refuses_missing_runs_checkpoints_and_splits")
def test_evaluate_refuses_a_changed_experiment(tmp_path, capsys):
    text = Path(TINY).read_text()
    Path("here.py").write_text(text)
    assert run.main(["--experiment", "./here.py", "--workdir", "r"]) == 0
    record = json.loads(Path("r/config.json").read_text())
    record["config"]["model.widths"] = "(9,)"
    Path("r/config.json").write_text(json.dumps(record))
    capsys.readouterr()
    error = refused(capsys, commands.main(["evaluate", "--experiment", "./here.py", "--workdir", "r"]))
    assert "model.widths was (9,) and is (8)" in error


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--experiment", "digit_cnn"], "no experiment is called digit_cnn: did you mean digits_cnn?"),
        (["--experiment", "./gone.py"], "experiment file ./gone.py does not exist"),
        (["--experiment", TINY, "--set", "optimiser.lr=1"], "did you mean optimizer?"),
        (["--experiment", TINY, "--set", "optimizer.momentun=1"], "did you mean optimizer.momentum?"),
        (["--experiment", TINY, "--set", "batch=many"], "batch=many: expected int, such as 16"),
        (["--experiment", TINY, "--set", "batch=1.5"], "batch=1.5: expected int"),
        (["--experiment", TINY, "--set", "batch"], "write path=value"),
        (["--experiment", TINY, "--set", "batch=12"], "batch 12 does not divide over 8 devices"),
        (["--experiment", TINY, "--set", "epochs=-1"], "epochs is -1.0: it must be above 0"),
        (["--experiment", TINY, "--set", "model.classes=3"], "label 3 of example"),
        (["--experiment", TINY, "--workdir", TINY], "is a file: give a folder"),
        (["--experiment", TINY, "--workdir", f"{TINY}/sub"], "cannot be written (Not a directory)"),
        (["--experiment", TINY, "--extend"], "--extend needs --workdir"),
        (["--experiment", TINY, "--overfit", "0"], "give a number of examples in 1..200"),
        (["--experiment", TINY, "--grace", "0"], "--grace 0: give seconds above 0"),
        (["--experiment", TINY, "--hang-after", "nan"], "--hang-after nan: give seconds above 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(args, message, capsys):
    assert message in refused(capsys, run.main(args))
    assert not Path("runs").exists()


def test_broken_experiment_files_are_refused_in_one_line(tmp_path, capsys):
    for text, message in [
        ("EXPERIMENT = 3", "must define EXPERIMENT = Experiment(...)"),
        ("import nothing_of_the_kind", "cannot be imported: ModuleNotFoundError"),
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
    ]:
        assert message in refused(capsys, run.main(["--experiment", user_file(tmp_path, text)]))


def test_channels_first_images_are_recognised(tmp_path, capsys):
    text = f"""
from importlib.util import spec_from_file_location, module_from_spec
spec = spec_from_file_location("tiny_again", {TINY!r})
tiny = module_from_spec(spec)
spec.loader.exec_module(tiny)
source = data.Arrays({{"image": np.zeros((64, 3, 16, 16), np.uint8), "label": np.zeros(64, np.int32)}})
EXPERIMENT = dataclasses.replace(tiny.EXPERIMENT, train=source, test=source, preprocess=(), augment=())
"""
    error = refused(capsys, run.main(["--experiment", user_file(tmp_path, text)]))
    assert "looks like [batch, channel, height, width] (NCHW)" in error


def test_a_failed_download_names_the_command(capsys, monkeypatch):
    """No server listens on port 1, so the connection is refused at once."""
    monkeypatch.setattr(
        download,
        "URLS",
        {name: tuple("http://127.0.0.1:1/x" for _ in urls) for name, urls in download.URLS.items()},
    )
    error = refused(capsys, run.main(["--experiment", "cifar_cnn"]))
    assert "python -m jaxtrain prepare cifar10 --from" in error
    settings = ["--set", "train.data_dir=my/data", "--set", "test.data_dir=my/data"]
    error = refused(capsys, run.main(["--experiment", "cifar_cnn", *settings]))
    assert "python -m jaxtrain prepare cifar10 --data-dir my/data --from" in error


@pytest.mark.full("tests/cli/test_cli.py::test_run_twice_then_new_then_evaluate")
def test_a_folder_with_another_run_or_other_files_is_refused(capsys):
    assert train("--workdir", "r", "--smoke") == 0  # a smoke test leaves no files
    assert not Path("r").exists()
    assert train("--workdir", "r") == 0
    before = {p: p.read_bytes() for p in Path("r").rglob("*") if p.is_file()}
    capsys.readouterr()
    error = refused(capsys, train("--workdir", "r", "--set", "optimizer.momentum=0.8"))
    assert "r holds another run: optimizer.momentum is 0.9 there and 0.8 here" in error
    error = refused(capsys, train("--workdir", "r", "--set", "epochs=2"))
    assert "--extend resumes it with the longer schedule" in error
    error = refused(capsys, train("--workdir", "r", "--set", "epochs=0.5", "--extend"))
    assert "epochs is 1 there and 0.5 here" in error
    assert before == {p: p.read_bytes() for p in Path("r").rglob("*") if p.is_file()}
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("")
    assert "is not empty and holds no run" in refused(capsys, train("--workdir", "mine"))


def test_smoke_refuses_what_a_run_refuses(capsys):
    assert "holdout=1.5 of 200" in refused(capsys, train("--smoke", "--set", "holdout=1.5"))
    assert "more than twice" in refused(capsys, train("--smoke", "--set", "batch=8000000"))


@pytest.mark.full("tests/cli/test_cli.py::test_evaluate_refuses_missing_runs_checkpoints_and_splits")
def test_a_damaged_record_is_exit_3(capsys):
    assert train("--workdir", "r") == 0
    Path("r/result.json").write_text('{"steps": 13}')
    capsys.readouterr()
    assert "result.json cannot be read" in refused(capsys, train("--workdir", "r"), 3)
    Path("r/config.json").write_text("{")
    capsys.readouterr()
    assert "config.json cannot be read" in refused(capsys, train("--workdir", "r"), 3)


@pytest.mark.full("tests/cli/test_cli.py::test_run_twice_then_new_then_evaluate")
def test_logging_may_change_on_resume_and_extend_adds_epochs(capsys):
    assert train("--workdir", "r", "--set", "log_every=3", "--set", "max_to_keep=4") == 0
    assert train("--workdir", "r", "--set", "epochs=2", "--extend") == 0
    out = capsys.readouterr().out
    assert "resuming at step 13/25" in out
    assert json.loads(Path("r/result.json").read_text())["steps"] == 25


@pytest.mark.full("tests/cli/test_cli.py::test_run_twice_then_new_then_evaluate")
def test_a_constant_rate_needs_no_extend(capsys):
    assert train("--workdir", "r", "--set", "optimizer.lr=0.1") == 0
    assert train("--workdir", "r", "--set", "optimizer.lr=0.1", "--set", "epochs=2") == 0
    assert "resuming at step 13/25" in capsys.readouterr().out


@pytest.mark.full("tests/cli/test_cli.py::test_run_twice_then_new_then_evaluate")
def test_default_folder_is_by_config_and_seed(capsys):
    assert train("--set", "epochs=0.3") == 0 and train("--set", "epochs=0.3", "--set", "seed=1") == 0
    assert train("--set", "epochs=0.4") == 0
    names = sorted(p.name for p in Path("runs/tiny").iterdir())
    seeds = [name.split("-")[1] for name in names]
    assert sorted(seeds) == ["seed0", "seed0", "seed1"] and len({n.split("-")[0] for n in names}) == 2


@pytest.mark.full("tests/cli/test_cli.py::test_run_twice_then_new_then_evaluate")
def test_overfit_reaches_full_accuracy_on_its_examples(capsys):
    assert train("--overfit", "16") == 0
    folder = next(Path("runs/tiny-overfit16").iterdir())
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 200 and result["test"]["accuracy"] == 1.0
    capsys.readouterr()
    assert commands.main(["evaluate", "--experiment", TINY, "--workdir", str(folder)]) == 0
    assert "16 examples" in capsys.readouterr().out


@pytest.mark.full("tests/experiment/test_config.py")
def test_config_json_is_a_record_of_the_run():
    assert train("--workdir", "r", "--set", "optimizer.momentum=0.8") == 0
    record = json.loads(Path("r/config.json").read_text())
    assert record["config"]["optimizer.momentum"] == "0.8"
    assert record["overrides"] == ["optimizer.momentum=0.8"] and record["mesh"] == {
        "data": 8,
        "fsdp": 1,
        "model": 1,
    }
    assert record["versions"]["jax"] and record["resident"] == {"train": True, "test": True}
    assert "0x" not in Path("r/config.json").read_text().replace(record["hash"], "")


def test_errors_in_orbax_threads_are_shown_only_with_debug(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(str(unraisable.exc_value)))

    def command(args):
        for text in ("Event loop is closed", "anything else"):
            sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))
        return 0

    assert command_line.main(command, command_line.Parser("it", "It."), []) == 0 and seen == ["anything else"]
    assert command_line.main(command, command_line.Parser("it", "It."), ["--debug"]) == 0 and len(seen) == 3


def test_resuming_warns_of_changed_versions(tmp_path):
    folder, record = tmp_path / "r", {"origin": "mine.py"}
    assert RunFolder(folder).record() is None
    RunFolder(folder).acquire("mine", EXPERIMENT, record)
    assert environment.changes(RunFolder(folder).record(), record) == []
    found = json.loads((folder / "config.json").read_text())
    found["versions"]["jax"] = "0.1"
    (folder / "config.json").write_text(json.dumps(found))
    (versions,) = environment.changes(RunFolder(folder).record(), record)
    assert RunFolder(folder).recorded_steps() == 0
    (folder / "metrics.jsonl").write_text('{"step": 5}\n{"step": 10}\n{"step": 1')
    assert RunFolder(folder).recorded_steps() == 10
    assert versions.startswith(f"jax was 0.1 and is {jax.__version__}: from here on numbers may differ")


@pytest.mark.full("tests/cli/test_listing.py")
def test_list_long_starts_no_backend_and_imports_nothing_heavy(python):
    code = (
        "import sys\nfrom jaxtrain import run\nassert run.main(['--list', '--long']) == 0\n"
        "from jax._src import xla_bridge\nassert not xla_bridge._backends\n"
        "heavy = {'tensorflow', 'wandb', 'matplotlib', 'optuna', 'grain', 'orbax', 'sklearn', 'torch'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert re.search(r"cifar_cnn +CIFAR-10 baseline.* cifar10 +CNN +[\d,]{7}", done.stdout)
    assert re.search(r"digits_cnn .* digits +CNN +65,834", done.stdout)


def test_importing_jaxtrain_loads_nothing_heavy(python):
    code = (
        "import sys, jaxtrain, jaxtrain.step.factories, jaxtrain.models\n"
        "print({'tensorflow', 'wandb', 'matplotlib', 'optuna', 'tensorflow_datasets'} & set(sys.modules))"
    )
    assert python("-c", code).stdout.strip() == "set()"


def test_help_lists_the_commands_and_a_typo_gets_a_suggestion(capsys):
    assert commands.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in commands.SUMMARIES)
    assert commands.main(["evalute"]) == 2
    assert capsys.readouterr().err == "jaxtrain: unknown command evalute: did you mean evaluate?\n"


@pytest.mark.full("tests/cli/test_cli.py")
def test_a_closed_output_pipe_ends_the_command_in_one_line(tmp_path):
    words = [sys.executable, "-m", "jaxtrain", "plan", "--experiment", tiny.__file__]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(words, check=False, stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(write)
    assert done.stderr == "jaxtrain plan: output pipe closed\n"
    assert done.returncode == 141


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (
            "from jaxtrain.cli import command_line\n"
            "parser = command_line.Parser('it', 'It.')\n"
            "print(command_line.main(lambda args: print('never here'), parser, []))",
            "it",
        ),
        ("from jaxtrain import __main__\nprint(__main__.main(['evaluate']))", "jaxtrain evaluate"),
    ],
    ids=["command", "door"],
)
def test_an_interrupt_is_delayed_until_jax_is_imported(tmp_path, code, name):
    (tmp_path / "jax.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('imported')\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(command_line.__file__).parents[2]}",
    }
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, check=True, env=environment, capture_output=True, text=True)
    assert done.stdout == "imported\n130\n"
    assert done.stderr == f"{name}: interrupted\n"
