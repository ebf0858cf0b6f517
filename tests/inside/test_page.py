"""The page and its server, without a browser: self-contained, closed to others, no injection."""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import http.client
import json
import re
import socket
import threading
import time

import pytest
from conftest import CHOSEN, load_twin
from lenses import ANSWER, QUESTION, open_lens, write_checkpoint

from coconut.inside.inspect import main
from coconut.inside.page import serve
from coconut.inside.page.page import page

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>&amp;@SCRIPT@\u2028"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("page") / "model", "pairs")


@pytest.fixture(scope="module")
def lens(checkpoint):
    return open_lens(load_twin(CHOSEN[0]), checkpoint)


def data_of(text: str) -> dict:
    (inside,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(inside)


def test_the_page_needs_no_network_and_runs_its_two_scripts_alone(lens):
    text = page(lens, "twin", [lens.inspect(QUESTION, ANSWER, 7, max_new_tokens=2)])
    assert not re.search(r'(?:src|href)="(?!data:)', text) and "@import" not in text
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert re.findall(r"'sha256-([^']*)'", policy) == hashes and len(hashes) == 2
    assert "default-src 'none'" in policy and "connect-src 'none'" in policy
    item = data_of(text)["items"][0]
    assert (item["question"], item["idx"], len(item["stops"])) == (QUESTION, 7, 4)


def test_nothing_from_data_or_model_becomes_markup(lens, monkeypatch):
    monkeypatch.setattr(lens, "spell", lambda token: EVIL)
    found = lens.inspect(f"{EVIL} Who?", EVIL, max_new_tokens=2)
    plain = page(lens, "twin", [lens.inspect("Who?", max_new_tokens=2)])
    text = page(lens, EVIL, [found])
    assert (
        len(re.findall("<script", text)) == len(re.findall("<script", plain)) and "<img" not in text
    )
    item = data_of(text)["items"][0]
    assert item["question"].startswith(EVIL) and item["thoughts"][0]["top"][0][0] == EVIL


def test_the_command_writes_the_page_whole_or_not_at_all(twin, checkpoint, tmp_path, capsys):
    argv = ["--model", str(checkpoint), "--question", QUESTION, "--max-new-tokens", "2"]
    out = tmp_path / "page.html"
    main(twin.__name__, twin.run.make_backend, [*argv, "--html", str(out)])
    assert data_of(out.read_text())["items"][0]["question"] == QUESTION
    for wrong, message in ((out / "x", "cannot be written"), (tmp_path, "is a folder; name a")):
        with pytest.raises(SystemExit):
            main(twin.__name__, twin.run.make_backend, [*argv, "--html", str(wrong)])
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_the_page_opens_with_the_reading_asked_for(twin, checkpoint, tmp_path):
    argv = ["--model", str(checkpoint), "--question", QUESTION, "--max-new-tokens", "2"]
    for asked, kind in (([], "step"), (["--reading", "answer"], "answer")):
        main(twin.__name__, twin.run.make_backend, [*argv, *asked, "--html", f"{tmp_path}/a.html"])
        assert data_of((tmp_path / "a.html").read_text())["own_reading"] == kind


@pytest.fixture(scope="module")
def server(checkpoint):
    options = argparse.Namespace(
        model=str(checkpoint), base=None, data=None, idx=None, question=None, latents=None,
        max_new_tokens=2, top=3, port=0,
    )  # fmt: skip
    twin = load_twin(CHOSEN[0])
    with serve.open_server(twin.__name__, twin.run.make_backend, options) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def request(server, method="POST", path="/ask", body=b"", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    headers = {k.replace("_", "-"): v for k, v in headers.items()}
    if method == "POST":
        headers = {"Content-Type": "application/json"} | headers
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    status, content = reply.status, reply.read().decode()
    connection.close()
    return status, content


def ask(server, question, **headers):
    return request(server, body=json.dumps({"question": question}).encode(), **headers)


def test_a_request_sent_byte_by_byte_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(serve, "SECONDS", 0.5)
    head = f"POST /ask HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    begin = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
        connection.sendall(head.encode())
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(100):
                connection.sendall(b" ")
                time.sleep(0.1)
    assert 0.4 < time.monotonic() - begin < 5
    monkeypatch.undo()
    assert ask(server, QUESTION)[0] == 200


def test_the_live_page_answers_questions(server):
    status, text = request(server, "GET", "/")
    assert status == 200 and data_of(text)["is_live"] and "connect-src 'self'" in text
    status, text = ask(server, QUESTION)
    assert status == 200 and json.loads(text)["gold"] == ANSWER
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "change, status, message",
    [
        ({"body": b'{"question": "  "}'}, 400, "is empty"),
        ({"body": b'{"question": "\\ud800"}'}, 400, "surrogate"),
        ({"body": json.dumps({"question": "a?" * 999}).encode()}, 400, "positions; shorten it"),
        ({"body": b'{"question": 3}'}, 400, "expected {"),
        ({"body": b"[]"}, 400, "expected {"),
        ({"body": b"\xff{"}, 400, "expected {"),
        ({"body": b"[" * 60000}, 400, "expected {"),
        ({"body": b" " * (serve.MAX_BODY + 1)}, 413, "too long"),
        ({"Content_Length": "-1"}, 411, "Content-Length"),
        ({"Content_Length": "9" * 5000}, 413, "too long"),
        ({"Content_Type": "text/plain"}, 415, "application/json"),
        ({"path": "/etc"}, 404, "no such page"),
        ({"method": "GET", "path": "/../README.md"}, 404, "no such page"),
        ({"Host": "evil.example"}, 403, "this machine only"),
        ({"Origin": "http://evil.example"}, 403, "this machine only"),
        ({"method": "GET", "path": "/", "Host": "evil.example:80"}, 403, "this machine only"),
    ],
)
def test_wrong_requests_get_a_message_and_no_traceback(server, capfd, change, status, message):
    found, text = request(server, **change)
    assert (found, message in json.loads(text)["error"]) == (status, True)
    assert capfd.readouterr().err == ""


def test_a_failing_model_is_reported_on_the_terminal_alone(server, monkeypatch, capfd):
    def fails(question):
        raise RuntimeError("secret")

    monkeypatch.setattr(server, "ask", fails)
    status, text = ask(server, QUESTION)
    assert status == 500 and "secret" not in text
    assert "secret" in capfd.readouterr().err


@pytest.mark.parametrize("port, message", [("70000", "0 to 65535"), ("taken", "choose another")])
def test_a_port_that_cannot_be_had_is_refused(server, checkpoint, capsys, port, message):
    port = str(server.server_port) if port == "taken" else port
    twin = load_twin(CHOSEN[0])
    with pytest.raises(SystemExit) as stopped:
        argv = ["--model", str(checkpoint), "--port", port]
        serve.main(twin.__name__, twin.run.make_backend, argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
