"""``report --serve``: who is answered, what is refreshed, and how it ends."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_cases import curve, result_of, write_run

from jaxtrain.cli import report as command
from jaxtrain.report.runs import Reader
from jaxtrain.report.server import Follower, Server
from jaxtrain.train.run_folder import RunFolder

WITNESS = "tests/report/test_server.py::test_the_data_are_new_once_a_run_has_written"


@contextlib.contextmanager
def serving(*runs: Path) -> Iterator[Server]:
    with Server(Follower(Reader(runs)), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def test_the_data_are_new_once_a_run_has_written(tmp_path) -> None:
    run = write_run(tmp_path / "run", curve(5))
    with serving(run) as server:
        status, headers, text = ask(server, "/")
        assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
        page = json.loads(re.search(rb'id="data">(.*?)</script>', text)[1])  # type: ignore[index]
        version = page["live"]["version"]
        assert b"connect-src 'self'" in text and headers["X-Frame-Options"] == "DENY"
        status, _, body = ask(server, f"/data?version={version}")
        assert (status, body) == (204, b"")
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 6, "train/loss": 0.125}\n{"step": 7, "tra')
        (run / "result.json").write_text(json.dumps(result_of(0.75)))
        status, _, body = ask(server, f"/data?version={version}")
        new = json.loads(body)
        assert status == 200 and new["version"] != version and "finished" in new["parts"]["results"]
        assert new["data"]["runs"][0]["series"]["train/loss"]["y"][-1] == 0.125
        assert ask(server, f"/data?version={new['version']}")[0] == 204


def test_a_run_that_trains_is_shown_as_running(tmp_path) -> None:
    run = write_run(tmp_path / "run", curve(5))
    with serving(run) as server:
        assert "stopped, step 5 of 40" in json.loads(ask(server, "/data")[2])["parts"]["results"]
        with RunFolder(run).locked():
            assert "running, step 5 of 40" in json.loads(ask(server, "/data")[2])["parts"]["results"]


def test_other_hosts_paths_and_methods_are_refused(tmp_path) -> None:
    with serving(write_run(tmp_path / "run", curve(5))) as server:
        port = server.server_address[1]
        for host in ("evil.example", f"evil.example:{port}", "", "127.0.0.1.evil.example"):
            status, _, body = ask(server, "/data", Host=host)
            assert status == 403 and b"train" not in body
        for host in ("localhost", f"LocalHost:{port}", f"127.0.0.1:{port}"):
            assert ask(server, "/data", Host=host)[0] == 200
        for path in ("/config.json", "/../config.json", "/data/x"):
            assert ask(server, path)[0] == 404
        assert ask(server, "/", "POST")[0] == 501 and ask(server, "/", "DELETE")[0] == 501
        assert server.server_address[0] == "127.0.0.1"


def test_a_run_that_is_removed_is_an_error_until_it_is_back(tmp_path) -> None:
    run = write_run(tmp_path / "run", curve(5))
    with serving(run) as server:
        text = (run / "config.json").read_text()
        (run / "config.json").unlink()
        status, _, body = ask(server, "/data")
        assert status == 503 and "holds no run" in json.loads(body)["error"]
        (run / "config.json").write_text(text)
        assert ask(server, "/data")[0] == 200


def test_a_port_in_use_is_one_line(tmp_path, capsys) -> None:
    run = write_run(tmp_path / "run", curve(5))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert command.main([str(run), "--serve", "--port", str(port)]) == 2
    assert f"port {port} of 127.0.0.1 cannot be used" in capsys.readouterr().err


@pytest.mark.full(WITNESS)
def test_ctrl_c_ends_the_server_with_130(tmp_path) -> None:
    run = write_run(tmp_path / "run", curve(5))
    words = [sys.executable, "-m", "jaxtrain", "report", str(run), "--serve", "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+)/ follows 1 folder; Ctrl-C ends it\n", line)[1])  # type: ignore[index]
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            connection.request("GET", "/data")
            assert connection.getresponse().status == 200
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "jaxtrain report: interrupted\n")
