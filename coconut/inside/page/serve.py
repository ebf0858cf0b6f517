"""`mlx-coconut serve --model DIR`: the page of inspect with a question box, on this machine."""

import argparse
import io
import json
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from coconut.backend import MakeBackend
from coconut.errors import UserError, guarded, machine_trouble, options_of
from coconut.inside.inspect import Asked, add_options, asked_questions, look
from coconut.inside.lens import Lens
from coconut.inside.page.page import page, page_item

HOST = "127.0.0.1"
MAX_BODY = 64 * 1024
SECONDS = 10
"""A connection that has not sent its request by then, or takes no answer, is closed."""


def main(twin: str, make_backend: MakeBackend, argv: Sequence[str] | None = None) -> None:
    """Serve the page for one checkpoint until stopped."""
    parser = options_of(
        twin, "serve", "See inside a thought, live: a page on this machine with a question box."
    )
    add_options(parser)
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one")
    options = parser.parse_args(argv)

    def run() -> None:
        with open_server(twin, make_backend, options) as server:
            print(f"open http://{HOST}:{server.server_port}/ (stop with Ctrl-C)", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print("stopped", file=sys.stderr)

    guarded(run)


class Server(ThreadingHTTPServer):
    """Answers one model's questions, one at a time."""

    daemon_threads = True

    def __init__(self, port: int, twin: str, lens: Lens, options: argparse.Namespace) -> None:
        self.lens, self.options = lens, options
        # On one thread for good: what a model computes lazily belongs to the thread that asked.
        self.model = ThreadPoolExecutor(1)
        found = [look(lens, asked, options) for asked in asked_questions(options)]
        self.page = page(lens, twin, found, is_live=True).encode("utf-8")
        super().__init__((HOST, port), Handler)

    def ask(self, question: str) -> dict[str, Any]:
        """What the page shows of a question. Raises UserError."""
        answer = self.model.submit(look, self.lens, Asked(question), self.options)
        return page_item(answer.result())


def open_server(twin: str, make_backend: MakeBackend, options: argparse.Namespace) -> Server:
    """A server that listens; raises UserError if the port or the options cannot be had."""
    if not 0 <= options.port < 2**16:
        raise UserError("command line", f"--port: must be 0 to 65535, got {options.port}")
    asked_questions(options)
    lens = Lens(options.model, make_backend, options.latents, options.base)
    try:
        return Server(options.port, twin, lens, options)
    except OSError as error:
        raise UserError(
            "command line", f"--port {options.port}: {error.strerror}; choose another, or 0"
        ) from error


class _Hurried(io.RawIOBase):
    """What a connection sends within SECONDS in all, however little at a time."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._end = connection, time.monotonic() + SECONDS

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(max(self._end - time.monotonic(), 1e-3))
        return self._connection.recv_into(buffer)


class Handler(BaseHTTPRequestHandler):
    """GET / is the page, POST /ask {"question": TEXT} an inspection or {"error": TEXT}."""

    server: Server

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_Hurried(self.connection))

    def do_GET(self) -> None:
        if not self._is_from_here():
            return self._fail(HTTPStatus.FORBIDDEN, "this server answers on this machine only")
        if self.path != "/":
            return self._fail(HTTPStatus.NOT_FOUND, "no such page; there is only /")
        return self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)

    def do_POST(self) -> None:
        if not self._is_from_here():
            return self._fail(HTTPStatus.FORBIDDEN, "this server answers on this machine only")
        if self.path != "/ask":
            return self._fail(HTTPStatus.NOT_FOUND, "no such page; questions go to /ask")
        # Other sites can make a browser post forms here, but not JSON.
        if self.headers.get_content_type() != "application/json":
            return self._fail(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected application/json")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            return self._fail(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length")
        if len(length) > 9 or int(length) > MAX_BODY:
            message = f"the question is too long: at most {MAX_BODY // 1024} kB"
            return self._fail(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
        try:
            asked = json.loads(self.rfile.read(int(length)))
            question = asked["question"]
            if not isinstance(question, str):
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError):
            return self._fail(HTTPStatus.BAD_REQUEST, 'expected {"question": TEXT}')
        try:
            found = self.server.ask(question)
        except UserError as error:
            return self._fail(HTTPStatus.BAD_REQUEST, str(error))
        except Exception as error:
            traceback.print_exc()
            message = "the model failed on this question; the server's terminal says how"
            message = machine_trouble(error) or message
            return self._fail(HTTPStatus.INTERNAL_SERVER_ERROR, message)
        return self._send(HTTPStatus.OK, "application/json", json.dumps(found).encode())

    def _is_from_here(self) -> bool:
        """Asked for by this machine's name: a foreign name that resolves here is refused."""
        port = self.server.server_port
        ours = {f"{host}:{port}" for host in (HOST, "localhost")}
        origin = self.headers.get("Origin")
        return self.headers.get("Host") in ours and (
            origin is None or origin.removeprefix("http://") in ours
        )

    def _fail(self, status: HTTPStatus, message: str) -> None:
        self.close_connection = True
        self._send(status, "application/json", json.dumps({"error": message}).encode())

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.connection.settimeout(SECONDS)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for what goes wrong."""
