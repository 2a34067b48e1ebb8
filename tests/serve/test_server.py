"""``python -m jaxtrain serve`` as a process: signals, malformed bytes, a kill, and the command line."""

from __future__ import annotations

import builtins
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import httpx
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from serve_cases import INFER, request

from jaxtrain.cli import serve

MODEL = ROOT / "tests" / "golden" / "artifacts" / "format1.jaxtrain"
RECORD = json.loads(MODEL.with_suffix(".json").read_text())
BODY = json.dumps(request(RECORD["image"][:1], (1, 8, 8, 1))).encode()
HEAD = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
WHOLE = f"{HEAD}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY
WITNESS = "tests/serve/test_app.py"


class Server:
    """The process of a server, and its address once it is ready."""

    def __init__(self, *args: str, **env: str) -> None:
        command = [sys.executable, "-m", "jaxtrain", "serve", "--model", str(MODEL), "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--max-batch", "2", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", **env},
        )
        assert self.process.stdout is not None
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.match(r"ready after [\d.]+ s: (http://\S+?:(\d+)/)", line):
                self.address, self.port = found[1], int(found[2])
                return
        raise AssertionError((self.lines, self.process.communicate()))

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Send a signal; returns the exit code and what was written after it was ready."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@contextlib.contextmanager
def serving(*args: str, **env: str) -> Iterator[Server]:
    server = Server(*args, **env)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()


def check_predicts(server: Server) -> None:
    answer = httpx.post(
        server.address + INFER[1:], content=BODY, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 200, answer.text
    probability = next(one for one in answer.json()["outputs"] if one["name"] == "probability")
    np.testing.assert_allclose(probability["data"], RECORD["probability"][0], atol=1e-5)


def read_all(connection: socket.socket) -> bytes:
    with contextlib.suppress(ConnectionResetError):
        return b"".join(iter(lambda: connection.recv(65536), b""))
    return b""


MALFORMED = [
    b"\x00\xff\x16\x03\x01" * 50,
    b"GET\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n",
    b"GET /%ff%00\x01 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000,
    (HEAD + "Content-Length: -1\r\n\r\n").encode(),
    (HEAD + "Content-Length: 99999999999999999999999\r\n\r\n").encode(),
    (HEAD + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n").encode(),
    (HEAD + "Transfer-Encoding: chunked\r\n\r\nzz\r\n").encode(),
    (HEAD + "Transfer-Encoding: chunked\r\n\r\n5\r\n{}\r\n").encode(),
]


@pytest.mark.full(WITNESS)
def test_malformed_bytes_and_lost_clients_harm_nobody_else():
    """A good connection is open all the time, and is answered after each of the bad ones."""
    with serving() as server, server.connect() as good:
        for data in MALFORMED:
            with server.connect() as bad:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    bad.sendall(data)
                    bad.shutdown(socket.SHUT_WR)
                got = read_all(bad)
                assert not got or got.split()[1].startswith(b"4"), (data[:60], got[:200])
        for cut in (10, len(HEAD), len(WHOLE) - 5, len(WHOLE)):
            with server.connect() as bad:  # closed before the answer, or in the middle of a request
                bad.sendall(WHOLE[:cut])
        for _ in range(2):
            good.sendall(WHOLE)
            answer = http.client.HTTPResponse(good)
            answer.begin()
            assert answer.status == 200 and b"probability" in answer.read()
        check_predicts(server)
        code, out, err = server.stop()
    assert code == 0 and re.search(r"stopped after \d+ requests\n", out) and err == ""


@pytest.mark.full(WITNESS)
def test_a_stop_finishes_what_has_been_sent_and_ends_with_0():
    """A request whose body is on its way when SIGTERM comes is answered; new connections are refused."""
    for number in (signal.SIGTERM, signal.SIGINT):
        with serving("--verbose") as server, server.connect() as idle, server.connect() as busy:
            busy.sendall(WHOLE[:-20])
            check_predicts(server)  # by now the server has read what was sent
            server.process.send_signal(number)
            assert idle.recv(100) == b""  # idle connections are closed first
            with pytest.raises(OSError):
                server.connect()
            busy.sendall(WHOLE[-20:])
            answer = read_all(busy)
            assert answer.startswith(b"HTTP/1.1 200") and b'"probability"' in answer
            out, err = server.process.communicate(timeout=60)
            assert server.process.returncode == 0 and "stopped after" in out
            assert err.count(f"POST {INFER} 200") == 2 and "Traceback" not in err


@pytest.mark.full(WITNESS)
def test_a_killed_server_starts_again_on_its_port_and_a_second_signal_ends_at_once():
    with serving() as server:
        check_predicts(server)
        port = server.port
        server.process.kill()
        server.process.communicate()
    with serving("--port", str(port)) as again:
        assert again.port == port
        check_predicts(again)
        done = subprocess.run(
            [sys.executable, "-m", "jaxtrain", "serve", "--model", str(MODEL), "--port", str(port)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
        assert f"port {port} of 127.0.0.1 cannot be used" in done.stderr
        with again.connect() as busy:
            busy.sendall(WHOLE[:-20])
            check_predicts(again)
            again.process.send_signal(signal.SIGTERM)
            assert again.process.stdout is not None
            with contextlib.suppress(OSError):
                while True:  # until it no longer listens, so that the two signals are two
                    again.connect().close()
            code, out, _ = again.stop()
        assert code == 143 and "stopped at once" in out


@pytest.mark.full(WITNESS)
def test_half_a_request_head_is_not_waited_for_forever():
    script = (
        "from jaxtrain.serve import settings; settings.HEAD_SECONDS = 1.0\n"
        "from jaxtrain.cli import serve; raise SystemExit(serve.main())"
    )
    command = [sys.executable, "-c", script, "--model", str(MODEL), "--port", "0", "--max-batch", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("ready"))
        address = "127.0.0.1", int(re.findall(r":(\d+)/", line)[0])
        with socket.create_connection(address, timeout=60) as half:
            half.sendall(WHOLE[:20])
            assert read_all(half) == b""
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.full(WITNESS)
def test_the_page_in_a_browser(tmp_path):
    """Choose an image and see the classes, on a dark phone, by keyboard, after asking for the token."""
    if browser.find_chromium() is None:
        pytest.skip("there is no Chromium on PATH: apt-get install chromium, or set CHROMIUM")
    pixels = np.array(RECORD["image"][0], np.uint8)[..., 0]
    Image.fromarray(pixels).save(tmp_path / "image.png")
    (tmp_path / "no.png").write_text("no image")
    likely = [f"{100 * p:.1f} %" for p in sorted(RECORD["probability"][0], reverse=True)]
    token = "0123456789abcdef-secret"
    with serving(JAXTRAIN_SERVE_TOKEN=token) as server:
        page = browser.Page(tmp_path, width=375, dark=True)
        try:
            page.open(server.address)
            page.wait("!document.getElementById('locked').hidden")
            page.call("Input.insertText", text="wrong token 01234567")
            page.key("Enter", "\r")
            page.wait("document.getElementById('error').textContent.includes('not the server')")
            page.run("document.getElementById('token').value = ''")
            page.call("Input.insertText", text=token)
            page.key("Enter", "\r")
            page.wait("!document.getElementById('image').hidden && document.title === 'example'")
            page.events = [e for e in page.events if e.get("method") != "Log.entryAdded"]  # of the 401
            page.run("document.body.focus()")
            page.key("Tab")
            assert page.run("document.activeElement.id") == "file"  # reached by keyboard
            assert page.run("getComputedStyle(document.getElementById('drop')).outlineStyle") == "solid"
            page.choose_file("#file", tmp_path / "image.png")
            page.wait("!document.getElementById('result').hidden")
            shown = (
                "[...document.querySelectorAll('#classes li span:last-child')].map(one => one.textContent)"
            )
            assert page.run(shown) == likely
            assert page.run("document.documentElement.scrollWidth <= 375")
            label = json.dumps("<img src=x onerror=document.title='run'>")
            page.run(f"show({{classes: [{{label: {label}, probability: 0.5}}]}})")
            assert page.run("document.querySelector('#classes span').textContent") == json.loads(label)
            assert page.run("document.querySelectorAll('#classes img').length") == 0
            assert page.problems() == []  # the policy refused nothing that the page needs
            page.choose_file("#file", tmp_path / "no.png")
            page.wait("document.getElementById('error').textContent.includes('cannot be decoded')")
            assert page.run("document.getElementById('result').hidden")
            assert page.run("document.title") == "example"
            sent = [one for one in page.requests() if not one.startswith(("data:", "blob:", "about:"))]
            assert sent and all(one.startswith(server.address) for one in sent)
        finally:
            page.close()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "absent.jaxtrain"], "absent.jaxtrain: there is no such file"),
        (["--model", __file__], "is not an artifact"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in: set JAXTRAIN_SERVE_TOKEN"),
        (["--host", "example.com"], "lets other machines in"),
        (["--port", "70000"], "--port 70000: give 0"),
        (["--max-batch", "0"], "--max-batch 0: give 1 to 1024"),
        (["--max-wait", "-1"], "--max-wait -1: give 0 to 1000"),
        (["--max-wait", "nan"], "--max-wait nan: give 0 to 1000"),
        (["--max-queue", "3"], "--max-queue 3: give at least --max-batch, 32"),
        (["--max-body", "0"], "--max-body"),
        (["--max-body", "nan"], "--max-body"),
        (["--timeout", "0"], "--timeout 0"),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_2(args, message, capsys, monkeypatch):
    monkeypatch.delenv("JAXTRAIN_SERVE_TOKEN", raising=False)
    code = serve.main(["--model", str(MODEL), "--port", "0", *args])
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("jaxtrain serve: ") and message in captured.err


def test_a_short_token_and_a_port_in_use_are_one_line(capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert serve.main(["--model", str(MODEL), "--port", str(port)]) == 2
        assert f"port {port} of 127.0.0.1 cannot be used" in capsys.readouterr().err
    monkeypatch.setenv("JAXTRAIN_SERVE_TOKEN", "hunter2")
    assert serve.main(["--model", str(MODEL), "--port", "0", "--host", "0.0.0.0"]) == 2
    captured = capsys.readouterr().err
    assert "JAXTRAIN_SERVE_TOKEN must have at least 16" in captured and "hunter2" not in captured


def test_a_missing_package_is_one_line_with_the_command(capsys, monkeypatch):
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "jaxtrain.serve" and args[2] == ("server",):
            raise ModuleNotFoundError("No module named 'starlette'", name="starlette.applications")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert serve.main(["--model", str(MODEL)]) == 2
    line = capsys.readouterr().err
    assert "starlette.applications is not installed: pip install 'jaxtrain[serve]'" in line


def test_the_model_file_is_the_only_path():
    """No route and no field of a request names a file: nothing in the service opens one but the page's."""
    for path in (ROOT / "jaxtrain" / "serve").glob("*.py"):
        source = Path(path).read_text()
        for name in (" open(", ".open(", "urlopen", "httpx", "requests.get", "FileResponse", "StaticFiles"):
            used = [line for line in source.splitlines() if name in line and "def " not in line]
            assert not used, (path.name, used)
