"""Reading and writing data files: every error names the file and the place in it."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from coconut.errors import UserError, guarded
from coconut.files import writing

Item = dict[str, Any]


def read_text(path: Path | str) -> str:
    """The file as UTF-8 text, line ends untouched. Raises UserError if that cannot be had."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(str(path), f"cannot be read: {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(
            str(path), f"not UTF-8 text (byte {error.start}); is it the right file?"
        ) from None


def parse_json(text: str, where: str) -> Any:
    """The JSON value in `text`; `where` names the file, and the line if there are several."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(where, f"not JSON ({error}); is it the right, whole file?") from None


def read_lines(path: Path | str) -> Iterator[tuple[str, str]]:
    """Pairs (`FILE line N`, text) of the file's lines that are not empty.

    Lines end at \\n only: a GSM8K question holds U+2028, at which str.splitlines would cut it.
    """
    empty = True
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            empty = False
            yield f"{path} line {number}", line.removesuffix("\r")
    if empty:
        raise UserError(str(path), "holds no items")


def field(
    item: Any, name: str, kind: type, where: str, remedy: str = "add one, or take the item out"
) -> Any:
    """`item[name]`, which must be of `kind` and, if a string or list, not empty.

    remedy: what to do about an empty one.
    """
    names = {str: "a string", list: "a list", dict: "an object", int: "a whole number"}
    if not isinstance(item, dict):
        raise UserError(where, f"expected an object, got {type(item).__name__}")
    if name not in item:
        raise UserError(where, f"field {name!r} is missing")
    value = item[name]
    # bool is an int to Python, but `"root": true` is a mistake.
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(where, f"field {name!r} must be {names[kind]}, got {type(value).__name__}")
    if kind is not int and not (value.strip() if isinstance(value, str) else value):
        raise UserError(where, f"field {name!r} is empty; {remedy}")
    return value


@contextmanager
def atomic(path: Path | str) -> Iterator[TextIO]:
    """A text file to write that takes its place at `path` only when the block ends well."""
    with writing(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        yield file


def write_items(path: Path | str, items: Iterable[Item]) -> int:
    """Write a JSON list, one item a line, atomically; return the number of items."""
    count = 0
    with atomic(path) as file:
        for item in items:
            file.write(",\n" if count else "[\n")
            json.dump(item, file, ensure_ascii=False, separators=(",", ":"))
            count += 1
        file.write("\n]\n" if count else "[]\n")
    return count


def command(main: Callable[[], None]) -> None:
    """Run a command's main: bad input is one message on stderr and exit status 2, no traceback."""
    guarded(main, "interrupted; nothing half-written is left")
