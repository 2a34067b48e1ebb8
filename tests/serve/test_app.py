"""The application in this process: the protocol over HTTP, limits, the Host header, the token, the page."""

from __future__ import annotations

import asyncio
import functools
import io
import json
import re
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import numpy as np
import pytest
import tiny
import uvicorn
from artifact_cases import make_trained
from conftest import ROOT
from PIL import Image
from serve_cases import INFER, LABELS, Client, client, images, numbers, request, texts

from jaxtrain import artifact
from jaxtrain.artifact import engines
from jaxtrain.export import write
from jaxtrain.serve import app as app_module
from jaxtrain.serve import page
from jaxtrain.serve.guard import HEADERS
from jaxtrain.serve.server import Server
from jaxtrain.serve.settings import Settings

PIXELS = [[64, 0, 0, 0], [0, 64, 128, 0], [0, 200, 0, 0]]


def scenario(function: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Make a test of a coroutine function."""

    @functools.wraps(function)
    def test(*args: Any, **kwargs: Any) -> None:
        asyncio.run(function(*args, **kwargs))  # type: ignore[arg-type]

    return test


def outputs(answer: httpx.Response) -> dict[str, np.ndarray]:
    assert answer.status_code == 200, answer.text
    return {
        one["name"]: np.array(one["data"], float).reshape(one["shape"]) for one in answer.json()["outputs"]
    }


def png(pixels: Any, mode: str = "L") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8), mode).save(file, "PNG")
    return file.getvalue()


def check_error(answer: httpx.Response, status: int, text: str) -> None:
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"] and text in answer.json()["error"], answer.text
    assert "\n" not in answer.json()["error"]


@scenario
async def test_health_and_metadata():
    async with client(images()) as http:
        assert (await http.get("/v2/health/live")).json() == {"live": True}
        assert (await http.get("/v2/health/ready")).json() == {"ready": True}
        server = (await http.get("/v2")).json()
        assert server["name"] == "jaxtrain" and server["models"] == ["example"]
        for path in ("/v2/models/example", "/v2/models/example/versions/7"):
            assert (await http.get(path + "/ready")).json() == {"name": "example", "ready": True}
            about = (await http.get(path)).json()
            assert about["versions"] == ["7"] and about["platform"] == "jaxtrain"
            assert about["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 2, 2, 1]}]
            assert about["outputs"][0] == {"name": "label", "datatype": "INT32", "shape": [-1]}
            assert about["parameters"]["labels"] == list(LABELS)
        for path in ("/v2/models/other", "/v2/models/example/versions/8", "/v2/models/other/ready"):
            check_error(await http.get(path), 404, "")
        check_error(await http.get("/v2/models"), 404, "nothing at this address")
        check_error(await http.get(INFER), 405, "does not take this method")


@scenario
async def test_requests_at_the_same_time_are_one_padded_batch_with_the_outputs_of_each():
    engine = images()
    async with client(engine, max_wait=1.0, max_batch=3) as http:
        assert [shape[0] for shape in engine.batches] == [1, 2, 3]  # warm
        answers = await asyncio.gather(*(http.post(INFER, json=request(row)) for row in PIXELS))
        assert [outputs(answer)["label"].tolist() for answer in answers] == [[0], [2], [1]]
        expected = engine._function({"image": np.array(PIXELS, np.uint8).reshape(3, 2, 2, 1)})
        found = np.concatenate([outputs(answer)["probability"] for answer in answers])
        np.testing.assert_allclose(found, expected["probability"], rtol=1e-6)
        assert engine.batches[3:] == [(3, 2, 2, 1)]
        two = await http.post(INFER, json=request(PIXELS[:2], (2, 2, 2, 1)))
        check_error(two, 400, "another size")
    async with client(engine := images(), max_batch=8) as http:
        answer = await http.post(INFER, json=request([n for row in PIXELS for n in row], (3, 2, 2, 1)))
        assert outputs(answer)["label"].tolist() == [0, 2, 1] and engine.batches[-1] == (4, 2, 2, 1)


@scenario
async def test_the_committed_artifact_answers_as_it_did_in_its_first_version():
    record = json.loads((ROOT / "tests/golden/artifacts/format1.json").read_text())
    model = artifact.load(ROOT / "tests/golden/artifacts/format1.jaxtrain")
    async with client(model, max_batch=4) as http:
        answer = await http.post(INFER, json=request(record["image"][:3], (3, 8, 8, 1)))
        np.testing.assert_allclose(outputs(answer)["probability"], record["probability"][:3], atol=1e-5)
        assert outputs(answer)["label"].tolist() == record["label"][:3]


@scenario
async def test_an_onnx_file_is_served_with_batches_as_they_are(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    trained = make_trained(tiny.EXPERIMENT)
    write.write("onnx", tmp_path / "model.onnx", trained)
    model = engines.open_model(tmp_path / "model.onnx", None)
    pixels = np.asarray(trained.examples["image"])[:3]
    async with client(model) as http:
        assert (await http.get("/v2/models/example")).json()["platform"] == "onnxruntime_onnx"
        answer = await http.post(INFER, json=request(pixels.tolist(), pixels.shape))
        np.testing.assert_allclose(outputs(answer)["logits"], np.asarray(model(pixels)["logits"]), rtol=1e-5)


@scenario
async def test_a_request_that_cannot_work_fails_alone(capsys):
    async with client(images(), max_wait=1.0, max_batch=3) as http:
        rows = [[64, 0, 0, 0], [0, 0, 0, 13], [0, 64, 0, 0]]
        good, bad, other = await asyncio.gather(*(http.post(INFER, json=request(row)) for row in rows))
        check_error(bad, 500, "internal error")
        assert outputs(good)["label"] == [0] and outputs(other)["label"] == [1]
        assert "RuntimeError: the model fails" in capsys.readouterr().err
        wrong = await http.post(INFER, json=request([1, 2, 3]))
        check_error(wrong, 400, "another size")


@scenario
async def test_nan_is_null_both_ways():
    async with client(images()) as http:
        answer = (await http.post(INFER, json=request([1, 2, 3, 14]))).json()
        assert answer["outputs"][1]["data"] == [None, None, None]
        shown = await http.post("/predict", content=png([[1, 2], [3, 14]]), headers=IMAGE_TYPE)
        assert [row["probability"] for row in shown.json()["classes"]] == [None] * 3
    for dtype, datatype in (("float16", "FP16"), ("bfloat16", "BF16"), ("float32", "FP32")):
        async with client(numbers(dtype)) as http:
            one = {"name": "x", "shape": [2, 2], "datatype": datatype, "data": [1, 2.5, None, 1]}
            answer = (await http.post(INFER, json={"inputs": [one]})).json()
            assert answer["outputs"] == [
                {"name": "value", "shape": [2], "datatype": datatype, "data": [3.5, None]}
            ]


IMAGE_TYPE = {"Content-Type": "image/png"}
JSON_TYPE = {"Content-Type": "application/json"}


@scenario
async def test_wrong_bodies_have_one_line_and_their_status():
    async with client(images(), max_body=2000) as http:

        async def post(content: Any, headers: Any = JSON_TYPE, path: str = INFER) -> httpx.Response:
            return await http.post(path, content=content, headers=headers)

        async def chunks() -> Any:
            for _ in range(10):
                yield b"[" * 500

        check_error(await post(b"{}", {"Content-Type": "text/plain"}), 415, "Content-Type: application/json")
        check_error(await post(b"{}", {}), 415, "Content-Type: application/json")
        check_error(await post(b"{}", {**JSON_TYPE, "Content-Encoding": "gzip"}), 415, "Content-Encoding")
        check_error(await post(b"{}", {**JSON_TYPE, "Inference-Header-Content-Length": "2"}), 415, "binary")
        check_error(await post(b"{"), 400, "not JSON")
        check_error(await post(b" " * 2001), 413, "more than 2000 bytes")
        check_error(await post(chunks()), 413, "more than 2000 bytes")  # without Content-Length
        check_error(await post(json.dumps(request([0] * 20, (5, 2, 2, 1)))), 413, "at most 4")
        check_error(await post(b"", JSON_TYPE, "/predict"), 415, "the model takes images")
        check_error(await post(b"", IMAGE_TYPE, "/predict"), 400, "cannot be decoded")
        check_error(await post(b"%PDF-1.4", IMAGE_TYPE, "/predict"), 400, "cannot be decoded")
        assert http.service._held == 0


@scenario
async def test_an_image_of_any_size_gets_its_classes_with_labels_as_data():
    async with client(images()) as http:
        image = png(np.full((4, 4), 128))
        shown = (await http.post("/predict", content=image, headers=IMAGE_TYPE)).json()
        assert {row["label"] for row in shown["classes"]} == set(LABELS)
        one = await http.post("/predict", content=png([[0, 128], [0, 0]]), headers=IMAGE_TYPE)
        assert one.json()["classes"][0] == {
            "label": LABELS[1],
            "probability": pytest.approx(np.exp(2) / (2 + np.exp(2)), rel=1e-5),
        }
        assert one.headers["content-type"] == "application/json"
    async with client(numbers("float32")) as http:
        check_error(await http.post("/predict", content=image, headers=IMAGE_TYPE), 400, "takes arrays")


@scenario
async def test_an_image_that_decodes_to_too_many_pixels_is_refused_by_its_header(monkeypatch):
    """A bomb: 20 kB of PNG are 20 million pixels. TIFF, whose decoders are many, is not read at all."""
    file = io.BytesIO()
    Image.new("L", (5000, 4000)).save(file, "PNG")
    monkeypatch.setattr(Image.Image, "load", None)  # it is not decoded
    async with client(images()) as http:
        answer = await http.post("/predict", content=file.getvalue(), headers=IMAGE_TYPE)
        check_error(answer, 400, "the image has 5000 × 4000 pixels: at most 16,777,216 are decoded")
    tiff = io.BytesIO()
    monkeypatch.undo()
    Image.new("L", (2, 2)).save(tiff, "TIFF")
    async with client(images()) as http:
        answer = await http.post("/predict", content=tiff.getvalue(), headers=IMAGE_TYPE)
        check_error(answer, 400, "none of BMP, GIF, JPEG, PNG, WEBP")


@scenario
async def test_texts_are_tokenized_padded_and_cut(tmp_path):
    engine = texts()
    async with client(engine, max_batch=2) as http:
        assert engine.batches == [(1, 32), (1, 64), (1, 100), (2, 32), (2, 64), (2, 100)]  # warm
        for name, found in (("abc", 99), ("x" * 70, 120), ("/etc/passwd", 100), ("é", 0xA9)):
            shown = (await http.post("/predict", json={"text": name})).json()
            assert shown["classes"][0]["label"] == repr(chr(found))
        assert set(engine.batches[6:]) == {(1, 32), (1, 100)}
        two = {"inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": ["ab", "cd"]}]}
        logits = outputs(await http.post(INFER, json=two))["logits"]
        assert logits.shape == (2, 2, 256) and logits.argmax(-1).tolist() == [[97, 98], [99, 100]]
        two["inputs"][0]["data"] = ["ab", "c"]
        check_error(await http.post(INFER, json=two), 400, "the same number of tokens")
        for body, message in (
            ({"text": ""}, "at least one character"),
            ({"text": 1}, 'send {"text": "..."}'),
            ({"text": "a", "path": "/etc/passwd"}, 'send {"text": "..."}'),
            ({}, 'send {"text": "..."}'),
        ):
            check_error(await http.post("/predict", json=body), 400, message)
        half = b'{"text": "\\ud800"}'
        check_error(await http.post("/predict", content=half, headers=JSON_TYPE), 400, "not Unicode")
        check_error(await http.post("/predict", content=png([[1]]), headers=IMAGE_TYPE), 415, "takes texts")


@scenario
async def test_a_full_queue_is_429_and_the_others_are_answered():
    engine = images()
    async with client(engine, max_batch=1, max_queue=2) as http:
        engine.go.clear()
        warm = len(engine.batches)
        running = asyncio.create_task(http.post(INFER, json=request([1, 2, 3, 0])))
        while len(engine.batches) == warm:
            await asyncio.sleep(0)
        waiting = {asyncio.create_task(http.post(INFER, json=request([1, 2, 3, 0]))) for _ in range(5)}
        done: set[Any] = set()
        while len(waiting) > 2:
            more, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            done |= more
        for task in done:
            check_error(task.result(), 429, "2 examples are waiting")
            assert task.result().headers["retry-after"] == "1"
        assert (await http.get("/v2/health/ready")).status_code == 200
        assert b"jaxtrain_queue_examples 2.0" in (await http.get("/metrics")).content
        engine.go.set()
        assert {task.result().status_code for task in (await asyncio.wait({running, *waiting}))[0]} == {200}


@scenario
async def test_a_request_without_a_result_in_time_is_503_and_leaves_the_queue():
    engine = images()
    async with client(engine, timeout=0.05, max_batch=1) as http:
        engine.go.clear()
        for _ in range(3):
            answer = await http.post(INFER, json=request([1, 2, 3, 0]))
            check_error(answer, 503, "no result within 0.05 s")
        batcher = http.service.batcher
        assert batcher is not None
        while batcher.waiting:  # for what was cancelled to go
            await asyncio.sleep(0)
        engine.go.set()


@scenario
async def test_a_client_that_goes_away_leaves_the_queue():
    engine = images()
    async with client(engine, max_batch=1) as http:
        batcher = http.service.batcher
        assert batcher is not None
        engine.go.clear()
        running = asyncio.create_task(http.post(INFER, json=request([1, 2, 3, 0])))
        while len(engine.batches) < 2:
            await asyncio.sleep(0)
        gone = asyncio.Event()
        task = asyncio.create_task(raw(http, json.dumps(request([9, 9, 9, 0])).encode(), gone))
        while not batcher.waiting:
            await asyncio.sleep(0)
        gone.set()
        assert await task == 499
        while batcher.waiting:
            await asyncio.sleep(0)
        engine.go.set()
        assert (await running).status_code == 200
    assert len(engine.batches) == 2


async def raw(http: Client, body: bytes, gone: asyncio.Event) -> int:
    """Call the application as a server does whose client goes after ``gone``; returns the status."""
    transport = http._transport
    assert isinstance(transport, httpx.ASGITransport)
    sent, statuses = False, []

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    head = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": INFER, "headers": head, "query_string": b""}
    await transport.app(
        {**scope, "root_path": "", "raw_path": INFER.encode(), "scheme": "http"}, receive, send
    )
    return int(statuses[0])


@scenario
async def test_a_body_that_is_cut_off_or_late_or_with_too_many_others_is_refused(monkeypatch):
    monkeypatch.setattr(app_module, "BODY_SECONDS", 0.02)
    monkeypatch.setattr(app_module, "MAX_HELD_BODIES", 0)
    async with client(images()) as http:

        async def endless() -> Any:
            await asyncio.Event().wait()
            yield b""

        check_error(await http.post(INFER, content=endless(), headers=JSON_TYPE), 408, "did not arrive")
        check_error(await http.post(INFER, content=b"{}", headers=JSON_TYPE), 503, "too many bytes")
        assert http.service._held == 0


@scenario
async def test_nothing_is_predicted_before_the_model_is_warm():
    engine = images()
    engine.go.clear()
    async with client(engine, warm=False) as http:
        assert (await http.get("/v2/health/live")).status_code == 200
        assert (await http.get("/")).status_code == 200
        for answer in (
            await http.get("/v2/health/ready"),
            await http.get("/v2/models/example/ready"),
            await http.post(INFER, json=request([1, 2, 3, 0])),
            await http.post("/predict", content=png([[1, 2], [3, 0]]), headers=IMAGE_TYPE),
        ):
            check_error(answer, 503, "not ready")
            assert answer.headers["retry-after"] == "1"
        engine.go.set()


@scenario
async def test_another_host_name_is_refused_as_after_dns_rebinding():
    async with client(images()) as http:
        for name in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"):
            assert (await http.get("/v2", headers={"Host": name})).status_code == 200, name
        for name in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil", ""):
            for path in ("/", "/v2", "/v2/health/live", "/metrics"):
                check_error(await http.get(path, headers={"Host": name}), 403, "Host header")


TOKEN = "0123456789abcdef-secret"


@scenario
async def test_with_a_token_only_the_page_and_health_are_open():
    async with client(images(), token=TOKEN, hosts=None) as http:
        for path in ("/", "/v2/health/live", "/v2/health/ready"):
            assert (await http.get(path, headers={"Host": "any.example"})).status_code == 200
        for path in ("/v2", "/v2/models/example", "/metrics", "/nothing", "/v2/health/live/"):
            for given in ("", TOKEN, "Bearer", "Bearer x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}"):
                headers = {"Authorization": given} if given else {}
                answer = await http.get(path, headers=headers)
                check_error(answer, 401, "wants its token")
                assert answer.headers["www-authenticate"] == "Bearer"
        answer = await http.post(INFER, json=request([1, 2, 3, 0]))
        check_error(answer, 401, "wants its token")
        headers = {"Authorization": f"Bearer {TOKEN}"}
        assert (await http.post(INFER, json=request([1, 2, 3, 0]), headers=headers)).status_code == 200
        latin = {"Authorization": b"Bearer \xe9\xff"}
        assert (await http.get("/v2", headers=latin)).status_code == 401


def test_the_token_is_compared_in_constant_time_and_short_ones_are_refused():
    source = (ROOT / "jaxtrain" / "serve" / "guard.py").read_text()
    assert "hmac.compare_digest(" in source
    for text in ("", "short", "0123456789abcde", "with a space 0123456", "é" * 20, "line\n0123456789abc"):
        with pytest.raises(ValueError, match="at least 16"):
            Settings(token=text)


@scenario
async def test_every_answer_has_the_headers_that_keep_browsers_out():
    async with client(images()) as http:
        for answer in (await http.get("/"), await http.get("/nothing"), await http.get("/metrics")):
            for name, value in HEADERS:
                assert answer.headers[name.decode()] == value.decode()
            assert "access-control-allow-origin" not in answer.headers


@scenario
async def test_a_server_that_stops_says_so_in_its_answers():
    """A client that keeps its connection would send the next request into a closed socket."""
    async with client(images()) as http:
        assert "connection" not in (await http.get("/v2")).headers
        Server(uvicorn.Config(http.guard)).handle_exit(signal.SIGTERM, None)
        assert (await http.get("/v2")).headers["connection"] == "close"


@scenario
async def test_a_slash_too_many_is_404_and_a_number_too_long_400():
    async with client(images()) as http:
        check_error(await http.get("/v2/"), 404, "nothing at this address")
        body = b'{"inputs": ' + b"9" * 5000 + b"}"
        answer = await http.post(INFER, content=body, headers={"Content-Type": "application/json"})
        check_error(answer, 400, "too many digits")


def test_the_page_writes_texts_only_as_text_and_asks_nobody_else():
    for name in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "http://",
        "https://",
    ):
        assert name not in page.HTML
    assert re.findall(r' (?:on\w+|style)="', page.HTML) == []
    assert page.POLICY.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in page.POLICY


@scenario
async def test_metrics_count_requests_and_batches():
    async with client(images(), max_wait=1.0, max_batch=2) as http:
        await asyncio.gather(*(http.post(INFER, json=request([1, 2, 3, 0])) for _ in range(2)))
        await http.get("/" + "x" * 50)
        text = (await http.get("/metrics")).text
        assert 'jaxtrain_requests_total{code="200",endpoint="infer"} 2.0' in text
        assert 'jaxtrain_requests_total{code="404",endpoint="other"} 1.0' in text
        assert "jaxtrain_batch_examples_sum 2.0" in text and "jaxtrain_batch_examples_count 1.0" in text
        assert "jaxtrain_ready 1.0" in text and "xxx" not in text


@scenario
async def test_verbose_writes_a_line_for_each_request(capsys):
    async with client(images(), verbose=True) as http:
        await http.get("/v2?token=secret")
        await http.post(INFER, content=b"{", headers=JSON_TYPE)
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"127\.0\.0\.1 GET /v2 200 [\d.]+ ms", lines[0])
    assert re.fullmatch(rf"127\.0\.0\.1 POST {INFER} 400 [\d.]+ ms", lines[1]) and len(lines) == 2
    async with client(images()) as http:
        await http.get("/v2")
    assert capsys.readouterr().err == ""
