"""Files read, written whole or not at all, and their digests; errors name file and place."""

import errno
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from coconut.errors import UserError

HOST = re.sub(r"[^\w.]+", "_", platform.node(), flags=re.ASCII)[-48:] or "_"
"""This machine, as the name of a file that is being written says it."""
_PACKAGE = Path(__file__).resolve().parent
SHIPPED = (
    *("args/**/*.yaml", "args/**/*.json", "docs/*.md", "docs/*.ipynb", "data/README.md"),
    *("data/prosqa_tiny.json", "data/prosqa_small_*.json", "data/prosqa_made_valid.json"),
    *("data/prosqa_made_test.json", "data/hops_valid.json", "data/chains_*.jsonl"),
    "data/checkpoints/*/*",
)
"""What an installed project has beside its code; setup.py copies it into `coconut/shipped/`."""


def shipped(name: str) -> Path:
    """Where a file of SHIPPED lies: in a checkout, or in what the build put into the package.

    name: its path in the checkout, `data/prosqa_made_test.json`.
    """
    installed = _PACKAGE / "shipped"
    return (installed if installed.is_dir() else _PACKAGE.parent) / name


def here_or_shipped(name: str) -> str:
    """A path as it is, or where nothing lies there the file that ships under this path, if any."""
    found = shipped(name)
    return str(found) if not Path(name).exists() and found.exists() else name


def shipped_names(root: Path) -> list[str]:
    """Paths below `root` of the files of SHIPPED."""
    found = (path for pattern in SHIPPED for path in root.glob(pattern) if path.is_file())
    return sorted(path.relative_to(root).as_posix() for path in found)


def read_bytes(path: Path, remedy: str = "") -> bytes:
    """Content of a file. Raises UserError, with the remedy, if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(str(path), f"cannot be read: {error.strerror}{remedy}") from error


def read_json(path: Path, remedy: str = "") -> dict[str, Any]:
    """The JSON object in a file. Raises UserError, with the remedy, if there is none."""
    remedy = remedy and f"; {remedy}"
    try:
        content = json.loads(read_bytes(path, remedy))
    # RecursionError: brackets nested a thousand deep are damage too.
    except (ValueError, RecursionError) as error:
        raise UserError(str(path), f"not JSON, the file is damaged ({error}){remedy}") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(str(path), f"expected a JSON object, got {kind}{remedy}")
    return content


@contextmanager
def library_writes(path: Path, kind: type[Exception]) -> Iterator[None]:
    """What a library raises (kind) where the disk refuses, as the OSError that it is."""
    try:
        yield
    except kind as error:
        why = str(error).strip().split("\n")[0]
        raise OSError(errno.EIO, f"{path.name}: {why}", str(path)) from error


@contextmanager
def writing(path: Path | str) -> Iterator[Path]:
    """A hidden sibling to write, which takes its place at `path` if the block ends well.

    It is on the disk before the rename: a process killed at any moment leaves the old file or the
    new one. Raises UserError if the disk refuses.
    """
    path = Path(path)
    partial = hidden(path, "partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        flush(partial)
        partial.replace(path)
        flush(path.parent)
    except OSError as error:
        raise UserError(str(path), f"cannot be written: {error.strerror}") from error
    finally:
        # There is nothing to remove where no folder could be made: what is in its place is a file.
        with suppress(NotADirectoryError):
            partial.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, indented, whole or not at all. Raises ValueError on NaN or infinity."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    with writing(path) as partial:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces of a megabyte."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def hidden(path: Path, state: str) -> Path:
    return path.parent / f".{path.name}.{state}-{HOST}-{os.getpid()}"


def is_running(pid: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def flush(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network disks flush no folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def is_file_name(name: object) -> bool:
    # isprintable: neither NUL nor lone surrogates, which no file system call takes.
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and name.isprintable()
        and not set(name) & set("/\\")
    )


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name occurs twice")
    return content
