"""W&B's offline files and MLflow's stores hold each number of a run once, also after a kill and a resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT
from interrupted_run import expected, interrupted, same_but_speed

from jaxtrain.monitor.trackers import make_tracker

pytestmark = pytest.mark.full(
    "tests/monitor/test_trackers.py::test_every_tracker_gets_the_records_of_metrics_jsonl_also_after_a_resume"
)
KEY = "CANARY" + 34 * "a"


def wandb_history(file: Path) -> list[tuple[str, int, float]]:
    """Return (name, step, value) of a ``.wandb`` file: LevelDB's log format of protocol buffers.

    https://github.com/google/leveldb/blob/main/doc/log_format.md, after a header of seven bytes.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts, found = file.read_bytes(), 7, b"", []
    assert content[:4] == b":W&B"
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:  # the end of a block is filled with zeros
            place += left
            continue
        size, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # full, or the last part
            record, parts = Record.FromString(parts), b""
            items = {one.key or "/".join(one.nested_key): one.value_json for one in record.history.item}
            step = int(items.pop("_step", record.history.step.num))
            found += [(n, step, json.loads(v)) for n, v in items.items() if not n.startswith("_")]
    return sorted((n, step, float(value)) for n, step, value in found)


def latest(folder: Path) -> Path:
    (file,) = (folder / "wandb" / "latest-run").glob("run-*.wandb")
    return file


def mlflow_history(uri: str, run: str = "0123456789abcdef") -> list[tuple[str, int, float]]:
    """Return (name, step, value) of all metrics of the one MLflow run that belongs to ``run``."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiments = [one.experiment_id for one in client.search_experiments()]
    (found,) = client.search_runs(experiments, f"tags.`jaxtrain.run` = '{run}'")
    assert found.info.status == "FINISHED" and found.data.params["batch"] == "128"
    assert set(found.data.tags) == {"jaxtrain.run", "mlflow.runName"}  # no command line, no user, no host
    id = found.info.run_id
    return sorted(
        (m.key, m.step, m.value) for name in found.data.metrics for m in client.get_metric_history(id, name)
    )


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    for name in (
        "MLFLOW_TRACKING_URI",
        "MLFLOW_EXPERIMENT_NAME",
        "WANDB_MODE",
        "WANDB_PROJECT",
        "WANDB_BASE_URL",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def test_the_newest_wandb_folder_has_each_step_once(tmp_path):
    """Here after a stop, because one process cannot open a W&B run twice; below after a kill."""
    assert interrupted(tmp_path, lambda: make_tracker("wandb:offline"), stop=True) == []
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
    same_but_speed(wandb_history(latest(tmp_path)), expected(tmp_path))


def test_an_mlflow_folder_has_each_step_once(tmp_path):
    assert interrupted(tmp_path, lambda: make_tracker(f"mlflow:{tmp_path}/ml")) == []
    same_but_speed(mlflow_history(f"{tmp_path}/ml"), expected(tmp_path))


@pytest.fixture
def server(tmp_path):
    """The address of an MLflow server with a database, of the installation that ``.ci/run`` makes."""
    program = os.environ.get("JAXTRAIN_TEST_MLFLOW") or shutil.which(
        "mlflow", path=ROOT / ".cache/mlflow/bin"
    )
    if not program:
        pytest.skip("no MLflow server: set JAXTRAIN_TEST_MLFLOW to the program mlflow of the full package")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [program, "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    words += ["--default-artifact-root", str(tmp_path / "artifacts")]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONWARNINGS")}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)
        address = f"http://127.0.0.1:{port}"
        try:
            while True:
                assert process.poll() is None, (tmp_path / "server.log").read_text()
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.3)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def test_an_mlflow_server_has_each_step_once(tmp_path, server):
    assert interrupted(tmp_path, lambda: make_tracker(f"mlflow:{server}")) == []
    same_but_speed(mlflow_history(server), expected(tmp_path))


KILLS = """
import os, signal

class Kill:
    def start(self, run):
        self.run = run
    def write(self, records):
        saved = any(self.run.folder.glob("checkpoints/*/manifest.json"))
        if not self.run.start and saved and records[-1][0] >= 20:
            os.kill(os.getpid(), signal.SIGKILL)
    def finish(self, status):
        pass
"""


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    full = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "WANDB_API_KEY": KEY,
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-m", *words], env=full, capture_output=True, text=True, check=False
    )


@pytest.mark.nightly(
    "tests/monitor/test_trackers.py::test_every_tracker_gets_the_records_of_metrics_jsonl_also_after_a_resume"
)
def test_a_run_killed_and_resumed_is_complete_in_every_store_and_has_no_key(tmp_path, monkeypatch):
    """SIGKILL while records are sent; then ``track`` sends all again, twice, and nothing doubles."""
    monkeypatch.chdir(tmp_path)
    Path("kills.py").write_text(KILLS)
    words = ["jaxtrain.run", "--experiment", "digits_cnn", "--workdir", "r", "--set", "epochs=9"]
    words += [
        "--set",
        "log_every=2",
        "--set",
        "save_every=1",
        "--set",
        "eval_every=1",
        "--set",
        "holdout=100",
    ]
    words += ["--track", "wandb:offline", "--track", "mlflow:ml", "--track", "kills.py:Kill"]
    assert command(*words).returncode == -signal.SIGKILL
    resumed = command(*words)
    assert resumed.returncode == 0
    assert "resuming" not in command(*words).stdout  # finished
    record = json.loads(Path("r/config.json").read_text())
    wanted = expected(Path("r"))
    assert wanted[-1][1] > 20 and '"track' not in json.dumps(record)
    if (
        "is incomplete" in resumed.stdout
    ):  # a run waits a limited time for its trackers, and a busy machine is slow
        done = command("jaxtrain", "track", "--workdir", "r", "--to", "wandb:offline", "--to", "mlflow:ml")
        assert done.returncode == 0, done.stderr
    same_but_speed(wandb_history(latest(Path("r"))), wanted)
    same_but_speed(mlflow_history("ml", record["run"]), wanted)
    for _ in range(2):
        done = command("jaxtrain", "track", "--workdir", "r", "--to", "mlflow:ml", "--to", "mlflow:other")
        assert done.returncode == 0 and "all records of r" in done.stdout, done.stderr
        for store in ("ml", "other"):
            same_but_speed(mlflow_history(store, record["run"]), wanted)
    files = [path for folder in ("r", "ml") for path in Path(folder).rglob("*") if path.is_file()]
    assert len(files) > 20 and not [path for path in files if KEY.encode() in path.read_bytes()]
    logged = b"".join(path.read_bytes() for path in Path("r/wandb").rglob("*") if path.is_file())
    assert socket.gethostname().encode() not in logged and b"--workdir" not in logged


def test_servers_that_do_not_answer_are_lines_and_the_process_ends(tmp_path, monkeypatch):
    """A port that accepts and says nothing, for W&B, and one that refuses, for MLflow."""
    monkeypatch.chdir(tmp_path)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        words = ["jaxtrain.run", "--experiment", "digits_cnn", "--workdir", "r", "--set", "epochs=1"]
        words += ["--track", "wandb", "--track", "mlflow:http://me:CANARY-pass@127.0.0.1:9"]
        done = command(*words, WANDB_BASE_URL=address, WANDB_MODE="online")
    assert done.returncode == 0 and Path("r/result.json").exists(), done.stderr
    for name in ("wandb", "mlflow:http://<redacted>@127.0.0.1:9"):
        lines = [one for one in done.stdout.splitlines() if f"tracker {name} is incomplete, 0 of " in one]
        assert len(lines) == 1, done.stdout
        line = lines[0]
        assert line.endswith(f"send all with: python -m jaxtrain track --workdir {tmp_path}/r --to {name}")
    assert "CANARY" not in done.stdout + done.stderr
    assert not [p for p in Path("r").rglob("*") if p.is_file() and b"CANARY" in p.read_bytes()]
    done = command("jaxtrain", "track", "--workdir", "r", "--to", "mlflow:http://127.0.0.1:9")
    assert done.returncode == 3 and "did not take all records" in done.stderr
    assert command("jaxtrain", "track", "--workdir", "nowhere", "--to", "mlflow").returncode == 2
