"""Chat templates, filled in a process of their own: they come with a download and may never end.

A sandbox keeps a template from the machine's files, not from its time and memory.
"""

import atexit
import datetime
import functools
import json
import resource
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox

SECONDS, MEMORY, CHARACTERS = 5, 400 * 2**20, 2**20
"""What a template may take, and how long a text it may make."""
_START = "import sys; sys.path[:] = sys.argv[1:]; from coconut.text.filling import serve; serve()"


class Filler:
    """The process, started when it is first needed, and anew when a template has broken it."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def fill(self, template: str, given: dict[str, Any]) -> str:
        """The text that a template makes of what it is given. Raises ValueError saying why not."""
        with self._lock:
            kind, text = "", ""
            try:
                kind, text = json.loads(self._answer(json.dumps([template, given]).encode()))
            finally:
                if not kind:  # an answer that nobody waits for must not become the next
                    self.close()
        if kind == "error":
            raise ValueError(text)
        return text

    def _answer(self, request: bytes) -> bytes:
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-c", _START, *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the run
            )
            assert self._child.stdout
            self._child.stdout.readline()  # it is there; on a busy machine that takes a while
        child, begin = self._child, time.monotonic()
        assert child.stdin and child.stdout
        patience = threading.Timer(SECONDS, child.kill)
        patience.start()
        try:
            with suppress(BrokenPipeError):  # said below
                child.stdin.write(request + b"\n")
                child.stdin.flush()
            if line := child.stdout.readline():
                return line
        finally:
            patience.cancel()
        is_late = time.monotonic() - begin > SECONDS
        raise ValueError(f"takes more than {SECONDS} s" if is_late else "its process died")

    def close(self) -> None:
        """End the process; the next request starts another."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None


def serve() -> None:
    """Answer requests on stdin, a JSON line each: [template, what it is given]."""
    with suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    print("ready", flush=True)
    for line in sys.stdin:
        template, given = json.loads(line)
        try:
            answer = ["text", _filled(template, given)]
        except jinja2.TemplateError as error:
            answer = ["error", str(error)]
        except (Exception, RecursionError) as error:
            answer = ["error", f"{type(error).__name__}: {str(error)[:200]}"]
        print(json.dumps(answer), flush=True)


def _filled(template: str, given: dict[str, Any]) -> str:
    pieces, n = [], 0
    for piece in _compiled(template).generate(given):
        pieces.append(piece)
        n += len(piece)
        if n > CHARACTERS:
            raise jinja2.TemplateError(f"makes more than {CHARACTERS:,} characters")
    return "".join(pieces)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    # The settings and functions that transformers gives a template (tests compare with it).
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def complain(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = complain
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)
