"""The downloader against a stand-in server on 127.0.0.1: checked, resumed, clear when it fails."""

import dataclasses
import hashlib
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from coconut.errors import UserError
from coconut.tasks import official as files
from data import download

ROOT = Path(__file__).parents[2]
CONTENT = b"".join(b"line %d\n" % i for i in range(30_000))
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HUB_PATH = "/datasets/some/set/resolve/v1/deep/file.txt"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, with ranges; cuts as many answers half way as the server is told to."""

    def do_GET(self):
        state = self.server.state
        state["requests"].append((self.path, dict(self.headers)))
        if self.path not in ("/file.txt", HUB_PATH):
            self.send_error(404)
            return
        begin = 0
        if wanted := self.headers.get("Range"):
            begin = int(wanted.removeprefix("bytes=").partition("-")[0])
            if begin >= len(CONTENT):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}")
        else:
            self.send_response(200)
        body = CONTENT[begin:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if state["cuts"]:
            state["cuts"] -= 1
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.state = {"requests": [], "cuts": 0}
        httpd.url = f"http://127.0.0.1:{httpd.server_address[1]}"
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Retry at once; ignore proxies and offline switches of the machine the tests run on."""
    monkeypatch.setattr("data.download.time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def source(server, path="/file.txt", sha256=SHA256):
    return download.Source(server.url + path, "file.txt", sha256)


def ranges(server):
    return [headers.get("Range") for _, headers in server.state["requests"]]


def test_a_file_is_fetched_checked_and_not_fetched_again(server, tmp_path):
    path = download.fetch(source(server), tmp_path / "deep")
    assert path.read_bytes() == CONTENT
    assert download.fetch(source(server), tmp_path / "deep") == path
    assert len(server.state["requests"]) == 1
    assert list(path.parent.iterdir()) == [path]


def test_a_cut_connection_is_resumed_within_the_run(server, tmp_path):
    server.state["cuts"] = 2
    assert download.fetch(source(server), tmp_path).read_bytes() == CONTENT
    half = len(CONTENT) // 2
    assert ranges(server) == [None, f"bytes={half}-", f"bytes={half + half // 2}-"]


def test_the_next_run_asks_for_the_rest_only(server, tmp_path):
    (tmp_path / "file.txt.part").write_bytes(CONTENT[:1_000])
    assert download.fetch(source(server), tmp_path).read_bytes() == CONTENT
    assert ranges(server) == ["bytes=1000-"]


def test_a_run_that_gives_up_keeps_its_part_for_the_next(server, tmp_path, monkeypatch):
    # After the first half the server only hangs up.
    server.state["cuts"] = 1
    monkeypatch.setattr(Handler, "do_GET", once_then_hang_up(Handler.do_GET))
    with pytest.raises(UserError, match="run again to resume"):
        download.fetch(source(server), tmp_path)
    assert (tmp_path / "file.txt.part").read_bytes() == CONTENT[: len(CONTENT) // 2]
    assert not (tmp_path / "file.txt").exists()


def once_then_hang_up(serve):
    def do_get(handler):
        if handler.server.state["requests"]:
            handler.close_connection = True
        else:
            serve(handler)

    return do_get


def test_a_server_that_knows_no_ranges_sends_the_whole_file_again(server, tmp_path, monkeypatch):
    def whole(handler):
        del handler.headers["Range"]
        serve(handler)

    serve = Handler.do_GET
    monkeypatch.setattr(Handler, "do_GET", whole)
    (tmp_path / "file.txt.part").write_bytes(b"x" * 1_000)
    assert download.fetch(source(server), tmp_path).read_bytes() == CONTENT


def test_a_whole_part_left_by_a_killed_run_needs_no_server(tmp_path):
    (tmp_path / "file.txt.part").write_bytes(CONTENT)
    nowhere = download.Source("http://127.0.0.1:9/file.txt", "file.txt", SHA256)
    assert download.fetch(nowhere, tmp_path).read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused_and_nothing_kept(server, tmp_path):
    with pytest.raises(UserError, match="checksum mismatch") as caught:
        download.fetch(source(server, sha256="0" * 64), tmp_path)
    assert SHA256 in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_file_with_another_checksum_is_not_overwritten(server, tmp_path):
    (tmp_path / "file.txt").write_text("mine")
    with pytest.raises(UserError, match="another checksum"):
        download.fetch(source(server), tmp_path)
    assert (tmp_path / "file.txt").read_text() == "mine"


def test_a_part_longer_than_the_file_is_named(server, tmp_path):
    (tmp_path / "file.txt.part").write_bytes(CONTENT + b"more")
    with pytest.raises(UserError, match=r"file\.txt\.part does not fit; remove it"):
        download.fetch(source(server), tmp_path)


def test_a_missing_file_is_one_line(server, tmp_path):
    with pytest.raises(UserError) as caught:
        download.fetch(source(server, "/gone.txt"), tmp_path)
    assert str(caught.value) == (
        f"{server.url}/gone.txt: no such file there, or no access (HTTP 404); check the name"
    )
    assert not list(tmp_path.iterdir())


def test_no_network_is_one_line_and_leaves_nothing(tmp_path):
    nowhere = download.Source("http://127.0.0.1:9/file.txt", "file.txt", SHA256)
    with pytest.raises(UserError) as caught:
        download.fetch(nowhere, tmp_path)
    assert "download failed (" in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_error_of_ours_is_not_reported_as_a_network_fault(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise TypeError("a bug")

    monkeypatch.setattr(download, "_stream", broken)
    with pytest.raises(TypeError, match="a bug"):
        download.fetch(download.Source("http://127.0.0.1:9/x", "x", None), tmp_path)


def run(server, *arguments):
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": "hf_made_up",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run(
        [sys.executable, ROOT / "data" / "download.py", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_takes_a_file_of_a_hub_data_set_at_a_revision(server, tmp_path):
    server.state["cuts"] = 1
    options = ["--repo", "some/set", "--file", "deep/file.txt", "--revision", "v1"]
    done = run(server, *options, "--sha256", SHA256, "--out-dir", tmp_path)
    assert done.returncode == 0
    assert done.stdout == (f"have {tmp_path}/file.txt | {len(CONTENT):,} bytes | sha256 {SHA256}\n")
    assert {path for path, _ in server.state["requests"]} == {HUB_PATH}
    tokens = [headers.get("Authorization") for _, headers in server.state["requests"]]
    assert tokens == ["Bearer hf_made_up"] * 2


def test_the_token_goes_to_the_hub_only(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    download.fetch(source(server), tmp_path)
    (_, headers), *_ = server.state["requests"]
    assert "authorization" not in {name.lower() for name in headers}


AT_COMMIT = ("--file", "x", "--revision", "0" * 40)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gsm9k"], "unknown: gsm9k; known: prosqa, gsm8k-train"),
        ([], "give one or more NAMEs"),
        (["--repo", "some/set"], "--repo with --file"),
        ([*AT_COMMIT, "--repo", "a/b/c"], "expected OWNER/NAME, got 'a/b/c'"),
        ([*AT_COMMIT, "--repo", "some/set"], "no such file there, or no access (HTTP 404)"),
        (["--repo", "some/set", "--file", "x"], "--repo needs --revision COMMIT (40 digits), or"),
    ],
)
def test_command_answers_bad_input_with_status_2(server, tmp_path, arguments, message):
    done = run(server, *arguments, "--out-dir", tmp_path)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_every_known_source_is_pinned():
    for known in download.SOURCES.values():
        # The training file of ProsQA alone has no digest yet: it is recorded when it comes.
        assert known.name == "prosqa_train.json" or len(known.sha256) == 64
        assert known.licence
        assert any(len(part) == 40 for part in known.url.split("/")), known.url


# ---- the official ProsQA files


@pytest.fixture
def official(server, tmp_path, monkeypatch):
    """The official files at the stand-in server; the command, run where they are to go."""
    for name, source in download.SOURCES.items():
        if name.startswith("prosqa-"):
            known = {"url": f"{server.url}/file.txt", "sha256": source.sha256 and SHA256}
            monkeypatch.setitem(download.SOURCES, name, dataclasses.replace(source, **known))
    monkeypatch.chdir(tmp_path)

    def fetch(*arguments):
        monkeypatch.setattr(sys, "argv", ["download.py", *arguments])
        download.main()

    return fetch


def test_prosqa_is_fetched_where_the_published_files_look_for_it(official, tmp_path, capsys):
    official("prosqa")
    names = [f"data/prosqa_{part}.json" for part in ("train", "valid", "test")]
    first, *have = capsys.readouterr().out.splitlines()
    assert first == (
        "data/prosqa_train.json: its sha256 was not known before; recorded in"
        " data/prosqa_train.json.sha256"
    )
    said = [f"have {name} | {len(CONTENT):,} bytes | sha256 {SHA256}" for name in names]
    assert have == said
    found = sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "data").iterdir())
    assert found == sorted([*names, "data/prosqa_train.json.sha256"])
    assert (tmp_path / "data/prosqa_train.json.sha256").read_text() == f"{SHA256}\n"
    official("prosqa")
    assert capsys.readouterr().out.splitlines() == said


def test_the_recorded_digest_of_the_training_file_holds_from_then_on(official, tmp_path, capsys):
    official("prosqa-train")
    Path("data/prosqa_train.json").write_text("another")
    with pytest.raises(UserError, match="another checksum than published"):
        official("prosqa-train")
    Path("data/prosqa_train.json").unlink()
    Path("data/prosqa_train.json.sha256").write_text("0" * 64)
    with pytest.raises(UserError, match="checksum mismatch"):
        official("prosqa-train")
    assert not Path("data/prosqa_train.json").exists()


def test_the_official_sources_are_the_ones_that_a_run_knows():
    sources = {source.name: source for source in download.SOURCES.values()}
    for name, (_, known) in files.PROSQA.items():
        assert sources[name].sha256 == known
        assert sources[name].url == f"{files.AT}/{name}" and sources[name].folder == "data"
    digests = [known and known[:8] for _, known in files.PROSQA.values()]
    assert digests == [None, "c74e0de2", "82ddc0af"]
