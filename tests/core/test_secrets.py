"""No secret in a run's records and output; which settings are secrets."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

import pytest

from jaxtrain import __main__ as commands
from jaxtrain import run
from jaxtrain.cli import command_line, train
from jaxtrain.core import redact
from jaxtrain.core.errors import InputError
from jaxtrain.experiment import config_hash, config_text, first_difference, override

SECRETS = (
    "CANARY-Tok-1",
    "CANARY-Url-2",
    "CANARY-Query-3",
    "CANARY-Pass-4",
    "CANARY-Many-5",
    "CANARY-Set-6",
    "CANARY-Env-7",
)
FILE = """
import dataclasses
import os
import sys

import numpy as np

from jaxtrain import data, losses, models, optim
from jaxtrain.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Remote:
    token: str = "CANARY-Tok-1"
    url: str = "https://user:CANARY-Url-2@host/x?a=1&access_token=CANARY-Query-3"
    password: str = "CANARY-Pass-4"
    api_keys: tuple[str, ...] = ("CANARY-Many-5",)
    tokens: int = 7
    label_key: str = "fine"
    bad: int = -1

    def __len__(self):
        return 48

    def gather(self, indices):
        texts = (self.url, self.token, self.password, self.api_keys[0], os.environ["WANDB_API_KEY"])
        if 0 in indices:  # not in each: threads go on for a moment when the run is over
            print("fetching", *texts)
            print("fetched", *texts, file=sys.stderr)
        if self.bad in indices:
            raise OSError(f"cannot fetch {' '.join(texts)} CANARY-Url-2")
        image = np.asarray(indices)[:, None, None, None] % np.full((1, 2, 2, 1), 7)
        return {"image": image.astype(np.uint8), "label": (np.asarray(indices) % 7 > 3).astype(np.int32)}


EXPERIMENT = Experiment(
    model=models.MLP(widths=(4,), classes=2), train=Remote(), test=Remote(), loss=losses.CrossEntropy(),
    optimizer=optim.SGD(lr=0.1), preprocess=(data.Normalise(),), batch=16, epochs=2, log_every=1,
    placement="stream",
)
"""


@pytest.fixture
def secretive(tmp_path, monkeypatch):
    """The words of a command that runs an experiment full of secrets in ``r``, one of them overridden."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(redact, "_known", set())
    monkeypatch.setenv("WANDB_API_KEY", "CANARY-Env-7")
    monkeypatch.setenv("LONG_KEY", 1000 * "x")
    monkeypatch.setenv("KEYRING", str(tmp_path))  # a path is no secret, and is in many lines
    Path("mine.py").write_text(FILE)
    return ["--experiment", "mine.py", "--workdir", "r", "--set", "test.token=CANARY-Set-6"]


def leaks(*texts: str) -> list[tuple[str, str]]:
    """Where a secret stands: in the output given, and in every byte of every file under ``r``."""
    found = {f"output {number}": text.encode() for number, text in enumerate(texts)}
    found |= {str(path): path.read_bytes() for path in Path("r").rglob("*") if path.is_file()}
    return [(where, secret) for where, data in found.items() for secret in SECRETS if secret.encode() in data]


@pytest.mark.full("tests/core/test_secrets.py::test_long_output_is_masked_quickly")
def test_no_secret_in_the_files_and_the_output_of_a_run(secretive, capfd, monkeypatch):
    monkeypatch.setattr(
        "jaxtrain.core.signals._end", lambda line, code: None
    )  # or the watchdog would end pytest
    assert run.main([*secretive, "--hang-after", "0.02"]) == 0
    out, err = capfd.readouterr()
    assert (
        out.count("fetching https://<redacted>@host/x?a=1&access_token=<redacted>") > 3
        and "fetched https://<redacted>@" in err
    )
    assert leaks(out, err) == []
    written = {str(p.relative_to("r")) for p in Path("r").rglob("*") if p.is_file()}
    assert {"config.json", "metrics.jsonl", "result.json", "hang-0.txt"} <= written
    assert any("tensorboard" in name for name in written) and any("manifest.json" in name for name in written)
    record = json.loads(Path("r/config.json").read_text())
    assert record["origin"].startswith(str(Path.cwd()))
    assert record["overrides"] == ["test.token=<redacted>"]
    assert record["config"]["train.tokens"] == "7" and record["config"]["train.password"] == "<redacted>"
    assert record["config"]["train.url"] == "'https://<redacted>@host/x?a=1&access_token=<redacted>'"
    # The same command finds its run; the output of evaluate and of a refusal has no secret either.
    assert run.main(secretive) == 0
    assert run.main([*secretive, "--set", "train.password=CANARY-Tok-1"]) == 0  # a new password, the same run
    assert run.main([*secretive[:-2], "--set", "test.token=CANARY-Many-5"]) == 2
    assert "test.token is <redacted " in capfd.readouterr().err
    assert commands.main(["evaluate", "--workdir", "r", "--experiment", "mine.py"]) == 2
    out, err = capfd.readouterr()
    assert "read them from an environment variable in the file" in err and leaks(out, err) == []


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_no_secret_in_an_error(debug, secretive, capfd):
    """A source that fails at once, and one that fails in the middle of the run."""
    assert run.main([*secretive, "--set", "train.bad=0", *debug]) == 3
    out, err = capfd.readouterr()
    assert "cannot fetch https://<redacted>@host/x" in err and ("Traceback" in err) == bool(debug)
    assert leaks(out, err) == []
    assert run.main([*secretive, "--set", "train.bad=40", *debug]) in (1, 3)
    out, err = capfd.readouterr()
    assert "cannot fetch https://<redacted>@host/x" in err and ("Traceback" in err or not debug)
    assert leaks(out, err) == [] and Path("r/config.json").exists()


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_no_secret_in_the_error_of_a_file_that_cannot_be_loaded(debug, secretive, capfd):
    """Nothing is known of its secrets yet: what the traceback shows of the source is masked by its form."""
    bad = FILE.replace("batch=16", "batch=0").replace("train=Remote()", 'train=Remote(token="CANARY-Tok-1")')
    begins, made, rest = bad.partition("EXPERIMENT = Experiment(")
    Path("mine.py").write_text(begins + made + " ".join(rest.split()))  # in one line, which is shown
    assert run.main([*secretive, *debug]) == 2
    out, err = capfd.readouterr()
    assert "batch is 0" in err and ("Traceback" in err) == bool(debug) and leaks(out, err) == []
    assert ('token="<redacted>"' in err) == bool(debug)


def test_no_secret_in_the_traceback_of_a_bug(secretive, capfd):

    def bug(args):
        redact.placeholder("token", ["CANARY-Tok-1"])
        sys.stdout.writelines([f"{Path.cwd()}\n"])
        raise KeyError("CANARY-Tok-1")

    assert command_line.main(bug, command_line.Parser("p", ""), []) == 1
    out, err = capfd.readouterr()
    assert "KeyError: '<redacted>'" in err and leaks(out, err) == []
    assert out == f"{Path.cwd()}\n"  # though an environment variable called KEYRING has it too


def test_no_secret_in_the_resume_command(secretive):
    import argparse

    empty = argparse.Namespace(
        experiment="e", set=["a.token=CANARY-Tok-1", "batch=8", "url=http://u:CANARY-Url-2@h"], overfit=None,
        extend=False, strict=False, mesh=None, devices=None, simulate_devices=None, deterministic=False,
        profile=None, grace=30.0, hang_after=None, monitor_layers=False, track=["mlflow:http://u:CANARY-Pass-4@h"],
    )  # fmt: skip
    command = train.resume_command(empty, Path("r"))
    assert "--set batch=8" in command and command.count(redact.MARK) == 3 and leaks(command) == []


def test_which_settings_are_redacted(monkeypatch):
    import dataclasses

    monkeypatch.setattr(redact, "_known", set())

    @dataclasses.dataclass(frozen=True)
    class Settings:
        token: object = None
        url: str = ""
        nested: object = None

    def dump(**fields):
        return config_text(Settings(**fields))

    for value in (None, 3, 0.5, True, (1, 2), len):  # only text is a secret
        assert "redacted" not in str(dump(token=value))
    assert dump(token=("abc", 1))["token"].startswith("<redacted ")
    assert dump(token=b"abc")["token"].startswith("<redacted ")
    assert dump(nested={"x-api-key": "abc"})["nested.x-api-key"].startswith("<redacted ")
    assert dump(token={"any": "abc"})["token.any"].startswith("<redacted ")
    assert dump(nested={"my_secret": "abc", "passwords": ("a",)})["nested.my_secret"] == "<redacted>"
    assert dump(url="see https://host/a@b")["url"] == "'see https://host/a@b'"
    assert dump(url="ssh://git@host")["url"] == "'ssh://<redacted>@host'"
    assert dump(nested=("https://a:b@h", "x"))["nested"] == "('https://<redacted>@h', 'x')"


def test_the_message_of_a_key_error_is_printed():
    assert redact.redact("KeyError: 'image'") == "KeyError: 'image'"


def test_long_output_is_masked_quickly(monkeypatch):
    monkeypatch.setattr(redact, "_known", {"CANARY-Tok-1"})
    began = time.perf_counter()
    for long in (
        10**6 * "a",
        10**5 * "key",
        10**5 * "?a",
        10**5 * "://a",
        10**5 * "key=",
        "key=" + 10**6 * " ",
    ):
        assert len(redact.redact(long + "CANARY-Tok-1")) >= len(long)
    assert time.perf_counter() - began < 10


def test_the_run_hash_depends_on_tokens_and_not_on_passwords():
    import dataclasses

    @dataclasses.dataclass(frozen=True)
    class Settings:
        label_key: str = "fine"
        password: str = "one"
        url: str = "https://me:one@h"

    base = Settings()
    assert config_hash(base) == config_hash(Settings(password="two", url="https://me:two@h"))
    other = Settings(label_key="coarse")
    assert config_hash(base) != config_hash(other)
    path, was, now = first_difference(config_text(base), config_text(other))
    assert path == "label_key" and was != now and "fine" not in was + now
    plain = hashlib.sha256(b"fine").hexdigest()
    assert plain[:8] not in was  # not to be looked up in a table


def test_an_override_of_the_wrong_type_does_not_show_a_secret():
    import dataclasses

    @dataclasses.dataclass(frozen=True)
    class Settings:
        token: tuple[int, ...] | int = 3

    with pytest.raises(InputError) as error:
        override(Settings(), ["token=CANARY"])
    assert "token=<redacted>: expected" in str(error.value) and "CANARY" not in str(error.value)
