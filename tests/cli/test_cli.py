"""The commands as a user types them: what they print, what they refuse, how they stop and go on."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from tiny import EXPERIMENT

from jaxtrain import __main__ as verbs
from jaxtrain import checkpoint, run
from jaxtrain.cli import command_line
from jaxtrain.core.errors import InputError
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
    """The one line of an error."""
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
    """All arrays of the newest checkpoint, read without knowing the experiment."""
    from orbax.checkpoint import v1 as ocp

    with checkpoint.open(Path(folder)) as saved:
        newest = saved.latest()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Orbax would like to be told the shardings
        return {k: np.asarray(v) for k, v in ocp.load(newest.folder / "state").items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for path, value in a.items():
        np.testing.assert_array_equal(value, b[path], err_msg=path)


def test_a_run_then_the_same_again_then_new_then_evaluate(capsys):
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
    assert verbs.main(["evaluate", "--experiment", TINY, "--workdir", "r", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == result["test"]["accuracy"] and found["examples"] == 50
    assert found["step"] == 13 and len(found["recall"]) == 4
    assert verbs.main(["evaluate", "--experiment", TINY, "--workdir", "r", "--checkpoint", "7"]) == 0
    assert "step 7, test, 50 examples" in capsys.readouterr().out


def test_evaluate_refuses_what_is_not_there(capsys):
    assert "holds no run" in refused(capsys, verbs.main(["evaluate", "--workdir", "nowhere"]))
    assert train("--workdir", "r", "--set", "eval_every=none") == 0
    capsys.readouterr()
    code = verbs.main(["evaluate", "--experiment", TINY, "--workdir", "r", "--checkpoint", "5"])
    assert "give best, latest or a kept step (13)" in refused(capsys, code)
    code = verbs.main(["evaluate", "--experiment", TINY, "--workdir", "r", "--split", "valid"])
    assert "has no valid split" in refused(capsys, code)


def test_evaluate_refuses_an_experiment_that_has_changed_since(tmp_path, capsys):
    text = Path(TINY).read_text()
    Path("here.py").write_text(text)
    assert run.main(["--experiment", "./here.py", "--workdir", "r"]) == 0
    record = json.loads(Path("r/config.json").read_text())
    record["config"]["model.widths"] = "(9,)"
    Path("r/config.json").write_text(json.dumps(record))
    capsys.readouterr()
    error = refused(capsys, verbs.main(["evaluate", "--experiment", "./here.py", "--workdir", "r"]))
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
        (["--experiment", TINY, "--extend"], "name it with --workdir"),
        (["--experiment", TINY, "--overfit", "0"], "give a number of examples in 1..200"),
        (["--experiment", TINY, "--grace", "0"], "--grace 0: give seconds above 0"),
        (["--experiment", TINY, "--hang-after", "nan"], "--hang-after nan: give seconds above 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(args, message, capsys):
    assert message in refused(capsys, run.main(args))
    assert not Path("runs").exists()


def test_files_of_the_users_own_are_refused_in_one_line(tmp_path, capsys):
    for text, message in [
        ("EXPERIMENT = 3", "must define EXPERIMENT = Experiment(...)"),
        ("import nothing_of_the_kind", "cannot be imported: ModuleNotFoundError"),
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
    ]:
        assert message in refused(capsys, run.main(["--experiment", user_file(tmp_path, text)]))


def test_channels_first_images_are_named_as_such(tmp_path, capsys):
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


def test_data_that_cannot_be_fetched_names_the_command(capsys, monkeypatch):
    """Nobody listens on port 1, so the answer comes at once."""
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


def test_a_folder_of_another_run_or_of_something_else_is_refused(capsys):
    assert train("--workdir", "r", "--smoke") == 0  # a smoke test leaves nothing behind
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


def test_a_second_run_in_one_folder_is_refused(capsys):
    process = start(*LONG, "--workdir", "r")
    wait_for_step(process, 2)
    in_use = rf"r is in use by another run \(pid {process.pid} on"
    with pytest.raises(InputError, match=in_use), RunFolder("r").locked():
        pass
    process.kill()
    process.communicate()
    with RunFolder("r").locked():  # a killed run leaves no lock behind
        pass


def test_smoke_refuses_what_the_run_would(capsys):
    assert "holdout=1.5 of 200" in refused(capsys, train("--smoke", "--set", "holdout=1.5"))
    assert "more than twice" in refused(capsys, train("--smoke", "--set", "batch=8000000"))


def test_a_damaged_record_is_exit_3(capsys):
    assert train("--workdir", "r") == 0
    Path("r/result.json").write_text('{"steps": 13}')
    capsys.readouterr()
    assert "result.json cannot be read" in refused(capsys, train("--workdir", "r"), 3)
    Path("r/config.json").write_text("{")
    capsys.readouterr()
    assert "config.json cannot be read" in refused(capsys, train("--workdir", "r"), 3)


def test_cadence_and_devices_may_differ_on_resume_and_extend_goes_on(capsys):
    assert train("--workdir", "r", "--set", "log_every=3", "--set", "max_to_keep=4") == 0
    assert train("--workdir", "r", "--set", "epochs=2", "--extend") == 0
    out = capsys.readouterr().out
    assert "resuming at step 13/25" in out
    assert json.loads(Path("r/result.json").read_text())["steps"] == 25


def test_a_constant_rate_needs_no_extend(capsys):
    assert train("--workdir", "r", "--set", "optimizer.lr=0.1") == 0
    assert train("--workdir", "r", "--set", "optimizer.lr=0.1", "--set", "epochs=2") == 0
    assert "resuming at step 13/25" in capsys.readouterr().out


def test_default_folder_is_by_config_and_seed(capsys):
    assert train("--set", "epochs=0.3") == 0 and train("--set", "epochs=0.3", "--set", "seed=1") == 0
    assert train("--set", "epochs=0.4") == 0
    names = sorted(p.name for p in Path("runs/tiny").iterdir())
    seeds = [name.split("-")[1] for name in names]
    assert sorted(seeds) == ["seed0", "seed0", "seed1"] and len({n.split("-")[0] for n in names}) == 2


def test_overfit_reaches_full_accuracy_on_its_examples(capsys):
    assert train("--overfit", "16") == 0
    folder = next(Path("runs/tiny-overfit16").iterdir())
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 200 and result["test"]["accuracy"] == 1.0
    capsys.readouterr()
    assert verbs.main(["evaluate", "--experiment", TINY, "--workdir", str(folder)]) == 0
    assert "16 examples" in capsys.readouterr().out


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


def test_what_a_failed_saves_threads_print_is_for_debug(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(str(unraisable.exc_value)))

    def command(args):
        for text in ("Event loop is closed", "anything else"):
            sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))
        return 0

    assert command_line.main(command, argparse.ArgumentParser(), []) == 0 and seen == ["anything else"]
    assert command_line.main(command, argparse.ArgumentParser(), ["--debug"]) == 0 and len(seen) == 3


def test_going_on_tells_what_no_setting_shows(tmp_path):
    file, folder = tmp_path / "mine.py", tmp_path / "r"
    file.write_text("x = 1")
    record = {"origin": str(file), "file": environment.file_digest(str(file))}
    assert RunFolder(folder).record() is None
    RunFolder(folder).acquire("mine", EXPERIMENT, record)
    assert environment.changes(RunFolder(folder).record(), record) == []
    file.write_text("x = 2")
    found = json.loads((folder / "config.json").read_text())
    found["versions"]["jax"] = "0.1"
    (folder / "config.json").write_text(json.dumps(found))
    versions, changed = environment.changes(
        RunFolder(folder).record(), {**record, "file": environment.file_digest(str(file))}
    )
    assert RunFolder(folder).recorded_steps() == 0
    (folder / "metrics.jsonl").write_text('{"step": 5}\n{"step": 10}\n{"step": 1')
    assert RunFolder(folder).recorded_steps() == 10
    assert versions.startswith(f"jax was 0.1 and is {jax.__version__}: from here on numbers may differ")
    assert changed.startswith(f"{file} has changed since this run began")


def test_list_starts_no_backend_and_loads_nothing_heavy(python):
    code = (
        "import sys\nfrom jaxtrain import run\nassert run.main(['--list']) == 0\n"
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


def test_list_shows_a_broken_file_and_the_others(capsys):
    Path("experiments").mkdir()
    Path("experiments/broken.py").write_text("1 / 0")
    assert run.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert "cannot be loaded" in out and "digits_cnn" in out


def test_doctor_is_content_with_this_machine(python):
    done = python("-m", "jaxtrain", "doctor", devices=8)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no problem found" in done.stdout and "second step" in done.stdout


def test_verbs(capsys):
    assert verbs.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in verbs.SUMMARIES)
    assert verbs.main(["evalute"]) == 2
    assert "did you mean evaluate?" in capsys.readouterr().err


def start(*args, devices=1):
    command = [sys.executable, "-m", "jaxtrain.run", "--experiment", TINY, *args]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


LONG = ("--set", "epochs=300", "--set", "eval_every=none", "--set", "log_every=1")


def wait_for_step(process, step: int) -> None:
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(signum, code):
    process = start(*LONG, "--workdir", "my run")
    wait_for_step(process, 30)
    process.send_signal(signum)
    _, error = process.communicate()
    assert process.returncode == code, error
    stopped = int(re.search(r"stopped after step (\d+) of 3750", error).group(1))
    with checkpoint.open(Path("my run")) as saved:
        assert saved.latest().step == stopped >= 30
    command = error.partition("resume with: ")[2]
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "jaxtrain.run"] and words[-1] == "my run"
    resumed = start(*words[5:])
    line = next(line for line in resumed.stdout if "going on" in line)
    resumed.kill()
    resumed.communicate()
    assert f"resuming at step {stopped}/3750" in line


@pytest.mark.parametrize("devices", [1, 8])
def test_killed_and_resumed_is_bitwise_the_straight_run(devices):
    """SIGKILL in mid-run: the last checkpoint and the pure order are all that is left."""
    few = ("--set", "epochs=8", "--set", "eval_every=none", "--set", "log_every=1", "--set", "save_every=2")
    straight = start(*few, "--workdir", "a", devices=devices)
    killed = start(*few, "--workdir", "b", devices=devices)
    wait_for_step(killed, 60)
    while not list(Path("b/checkpoints").glob("*/manifest.json")):
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert straight.communicate() and straight.returncode == 0
    resumed = start(*few, "--workdir", "b", devices=devices)
    out, error = resumed.communicate()
    assert resumed.returncode == 0, error
    assert re.search(r"resuming at step (25|50)/100", out)
    same(leaves("a"), leaves("b"))
    a, b = (json.loads(Path(f, "result.json").read_text())["test"] for f in "ab")
    assert a == b


def test_a_second_interrupt_while_saving_does_not_hang(python):
    """A save that is cut off leaves threads behind which wait for ever."""
    code = f"""
import os, signal, sys, threading, time
from orbax.checkpoint import v1
from jaxtrain import run
from jaxtrain.cli import command_line

def cut_off(*args, **kwargs):
    threading.Thread(target=threading.Event().wait).start()
    while True:  # in the thread that writes; two signals at once would be one
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)

v1.save_async = cut_off
command_line.leave(run.main(["--experiment", {TINY!r}, "--workdir", "r"]))
"""
    done = python("-c", code)
    assert done.returncode == 130 and "interrupted at once" in done.stderr


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_at_once(signum, code):
    """A step of this batch takes long enough that the second signal comes before the loop looks."""
    process = start(*LONG, "--workdir", "r", "--set", "batch=20000", "--set", "epochs=30000")
    wait_for_step(process, 2)
    process.send_signal(signum)
    time.sleep(0.05)
    process.send_signal(signum)
    _, error = process.communicate()
    assert process.returncode == code and "interrupted at once" in error
    assert error.count("\n") == 1


def test_a_reader_that_leaves_ends_the_command_in_one_line(tmp_path):
    words = [sys.executable, "-m", "jaxtrain", "plan", "--experiment", tiny.__file__]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(words, check=False, stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(write)
    assert done.stderr == "jaxtrain plan: nobody reads the output any more\n"
    assert done.returncode == 141


def test_an_interrupt_waits_until_jax_is_imported(tmp_path):
    (tmp_path / "jax.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('imported')\n"
    )
    code = "import argparse; from jaxtrain.cli import command_line\n"
    code += "parser = argparse.ArgumentParser(prog='it')\n"
    code += "print(command_line.main(lambda args: print('never here'), parser, []))"
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(command_line.__file__).parents[2]}",
    }
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, check=True, env=environment, capture_output=True, text=True)
    assert done.stdout == "imported\n130\n"
    assert done.stderr == "it: interrupted at once; the last checkpoint is kept\n"
