"""Reading and writing data files: every error names the file and the place in it."""

import bz2
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from coconut.errors import UserError, guarded
from coconut.files import writing

Item = dict[str, Any]


_PACKED: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ\x00": lzma.decompress,
}
_PARQUET = b"PAR1"
_NOT_TEXT = {
    _PARQUET: "a parquet file, which only a run's items may be; write it as JSON lines",
    b"PK\x03\x04": "a zip archive; unpack it and name the file",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it (zstd -d)",
    b"version https://git-lfs": "a Git LFS pointer, not the data; fetch that (git lfs pull)",
    b"<": "a page or markup, not data; download the raw file",
}
"""How files begin: of what is unpacked, and of what is not read."""


def _read(path: Path | str) -> bytes:
    """A file's bytes, unpacked if they are gz, bz2 or xz."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(str(path), f"cannot be read: {error.strerror}; check the path") from None
    try:
        return next((_PACKED[b](content) for b in _PACKED if content.startswith(b)), content)
    except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise UserError(str(path), f"cannot be unpacked ({error}); is it whole?") from None


def read_text(path: Path | str, content: bytes | None = None) -> str:
    """The file as text, line ends untouched. Raises UserError if that cannot be had.

    UTF-8, UTF-16 or UTF-32; gz, bz2 and xz are unpacked. content: its bytes, if they were read.
    """
    content = _read(path) if content is None else content
    if is_what := next((_NOT_TEXT[b] for b in _NOT_TEXT if content.startswith(b)), None):
        raise UserError(str(path), f"is {is_what}")
    try:
        return content.decode(json.detect_encoding(content))
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


def read_lines(path: Path | str, text: str | None = None) -> Iterator[tuple[str, str]]:
    """Pairs (`FILE line N`, text) of the file's lines that are not empty.

    Lines end at \\n only: a GSM8K question holds U+2028, at which str.splitlines would cut it.
    text: the file's, if it was read.
    """
    empty = True
    for number, line in enumerate((read_text(path) if text is None else text).split("\n"), 1):
        if line.strip():
            empty = False
            yield f"{path} line {number}", line.removesuffix("\r")
    if empty:
        raise UserError(str(path), "holds no items")


def read_records(path: Path | str) -> Iterator[tuple[str, Any]]:
    """Pairs (`FILE line N` or `FILE item N`, value) of a file of items, however it holds them.

    A JSON list, JSON lines, or parquet if the package datasets is installed. An item whose chain of
    thought is one text, `cot`, gets its steps. Raises UserError.
    """
    for where, item in _records(path):
        if isinstance(item, dict) and "steps" not in item and isinstance(item.get("cot"), str):
            item = item | {"steps": split_chain(item["cot"])}
        yield where, item


def _records(path: Path | str) -> Iterator[tuple[str, Any]]:
    content = _read(path)
    if content.startswith(_PARQUET):
        items = _parquet(path)
    else:
        text = read_text(path, content)
        if text.lstrip()[:1] in ("{", ""):
            lines = list(read_lines(path, text))
            if len(lines) > 1 or "question" in text:  # else one object that is no item
                yield from ((where, parse_json(line, where)) for where, line in lines)
                return
        items = parse_json(text, str(path))
        if not isinstance(items, list):
            raise UserError(str(path), "expected a JSON list of items, or an item a line")
    yield from ((f"{path} item {i}", item) for i, item in enumerate(items))


def _parquet(path: Path | str) -> Iterable[Any]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            str(path), "is a parquet file; pip install datasets, or write it as JSON lines"
        ) from None
    try:
        return datasets.Dataset.from_parquet(str(path))  # type: ignore[no-any-return]
    # The library and those below it raise whatever a broken file makes them stumble over.
    except Exception as error:
        raise UserError(str(path), f"datasets cannot read it: {error}".splitlines()[0]) from None


def split_chain(text: str) -> list[str]:
    """The steps of a chain of thought in one text: its lines, else annotations, else sentences.

    Annotations `<<2+3=5>>` stand apart by single spaces, as iCoT and GSM8K-Aug write them.
    """
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) != 1:
        return lines
    pieces = lines[0].split(" ")
    if all(piece.startswith("<<") and piece.endswith(">>") for piece in pieces):
        return pieces
    return re.split(r"(?<=[.!?]) +", lines[0])


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
