"""Run and checkpoint directories: layout, atomic writes, checksums, retention.

    save_path/name/                 a run
        epoch_07/                   a checkpoint: a Hugging Face directory, and checksums.json
        .epoch_08.partial-HOST-4242/    being written by process 4242, or left by it, killed
        .epoch_07.replaced-HOST-4242/   the old one while that process puts a new one in its place
        .epoch_01.deleted-HOST-4242/    on its way out

A name without a dot is always complete: it appears by one rename of a directory already on disk.
"""

import os
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coconut.checkpoints.model_args import FORK_IDS
from coconut.checkpoints.safetensors import (
    TensorEntry,
    _is_entry,
    check_one_set,
    safetensors_header,
)
from coconut.checkpoints.verdict import check_tensors, judged
from coconut.errors import UserError, some
from coconut.files import (
    HOST,
    flush,
    hidden,
    is_file_name,
    is_running,
    read_json,
    sha256,
    write_json,
)
from coconut.lock import is_held

FORMAT_VERSION = 1
CONFIG, COCONUT, CHECKSUMS = "config.json", "coconut.json", "checksums.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTERS = "adapters.safetensors"
FEEDBACK = "feedback.safetensors"
OPTIMIZER = "optimizer.safetensors"
"""A feedback rule's own weights: beside the model's, so that other programs open these alone."""
REMEDY = "copy the checkpoint again, or delete it: a run goes on from the one before it"
"""Of one that is damaged."""

_CHECKPOINT_NAME = re.compile(r"epoch_(\d{2,})", re.ASCII)
_HIDDEN_NAME = re.compile(r"\.(.+)\.(partial|replaced|deleted)-(?:([\w.]*)-)?(\d+)", re.ASCII)
# This process's own partial directories: a container gives each run the same process number, so
# the number alone does not tell what is being written from what a killed run left.
_being_written: set[Path] = set()


@contextmanager
def write_atomically(directory: Path) -> Iterator[Path]:
    """A temporary sibling to fill, which becomes `directory` when the block ends well.

    Every file is checksummed and flushed to disk before the rename, so a process killed at any
    moment leaves the old directory or the new one. If the block raises, nothing changes. Leftovers
    of killed processes beside it are cleared first. Raises UserError if the disk refuses.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise UserError(str(directory), "a file of this name is in the way: move it")
    partial = hidden(directory, "partial")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        clean(directory.parent)
        partial.mkdir()
    except OSError as error:
        raise UserError(str(directory), f"cannot be written: {error.strerror}") from error
    _being_written.add(partial)
    try:
        yield partial
        _seal(partial)
        _put_in_place(partial, directory)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # Only the disk is the user's to mend; what the block itself raised passes through.
        if isinstance(error, OSError):
            raise UserError(str(directory), f"cannot be written: {error.strerror}") from error
        raise
    finally:
        _being_written.discard(partial)


def verify(directory: Path) -> None:
    """Check every file of a finished checkpoint against checksums.json.

    Raises UserError naming each missing, truncated or changed file; further files are allowed.
    """
    directory = Path(directory)
    _check_in_place(directory)
    if not (directory / CHECKSUMS).is_file():
        raise UserError(
            str(directory),
            f"no {CHECKSUMS}: not a finished checkpoint; delete it or name another one",
        )
    files = read_json(directory / CHECKSUMS, REMEDY).get("files")
    if not isinstance(files, dict) or not all(_is_entry(*item) for item in files.items()):
        problem = f"expected files with bytes and sha256; the file is damaged; {REMEDY}"
        raise UserError(str(directory / CHECKSUMS), problem)
    problems = []
    for name, entry in files.items():
        path = directory / name
        try:
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                problems.append(f"{name} is missing")
            elif size != entry["bytes"]:
                kind = "truncated" if size < entry["bytes"] else "changed"
                problems.append(f"{name} is {kind}: {size:,} of {entry['bytes']:,} bytes")
            elif sha256(path) != entry["sha256"]:
                problems.append(f"{name} is changed: its sha256 is not the one recorded")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}")
    if problems:
        problems[-1] += f"; {REMEDY}"
        raise UserError(str(directory), *problems)


def checkpoint_name(epoch: int) -> str:
    """`epoch_07`: the checkpoint after seven finished epochs."""
    return f"epoch_{epoch:02d}"


def epoch_of(directory: Path) -> int | None:
    """How many epochs a checkpoint of this name has behind it; None for any other name."""
    found = _CHECKPOINT_NAME.fullmatch(Path(directory).name)
    # The round trip rejects epoch_007 and digits too many to be a number of epochs.
    if found is None or len(found[1]) > 9 or checkpoint_name(int(found[1])) != found[0]:
        return None
    return int(found[1])


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; anything not named exactly like one is ignored."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        return []
    found = [path for path in run_dir.iterdir() if epoch_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: epoch_of(path) or 0)


def latest(run_dir: Path) -> Path | None:
    """The checkpoint with the most epochs behind it, None if there is none."""
    found = checkpoints(run_dir)
    return found[-1] if found else None


def prune(found: Sequence[Path], keep: int, spare: Collection[Path] = ()) -> list[Path]:
    """Delete all but the last `keep` of these checkpoints, and those in `spare` (the best one).

    Returns the deleted ones.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    spared = {Path(path).resolve() for path in spare}
    doomed = [path for path in found[:-keep] if path.resolve() not in spared]
    for path in doomed:
        delete(path)
    return doomed


def delete(directory: Path) -> None:
    """Delete a checkpoint, by a rename first: what is half deleted has not its name."""
    try:
        directory.rename(doomed := hidden(directory, "deleted"))
        shutil.rmtree(doomed)
    except OSError as error:
        raise UserError(str(directory), f"cannot be deleted: {error.strerror}") from error


def clean(run_dir: Path) -> None:
    """Recover and remove what killed processes left in a run directory."""
    recover(run_dir)
    for path, _, _ in _left_behind(run_dir):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def weight_files(directory: Path) -> dict[str, dict[str, TensorEntry]]:
    """Header of each weight file of a checkpoint, by file name: one, or the shards of an index.

    Of a checkpoint that holds an adapter, the adapter's. A single file beside an index, which
    transformers would read, is taken if it holds the same.
    Raises UserError if a file is missing or damaged, a shard lacks a tensor of the index, or there
    are two sets of weights.
    """
    directory = Path(directory)
    single, where = directory / WEIGHTS, directory / WEIGHTS_INDEX
    if where.exists() and single.exists():
        check_one_set(single, where, [directory / name for name in index_files(where)])
    if single.exists():
        return {WEIGHTS: safetensors_header(single)}
    if not where.exists():
        if (directory / ADAPTERS).exists():
            return {ADAPTERS: safetensors_header(directory / ADAPTERS)}
        raise UserError(str(directory), f"no weights: expected {WEIGHTS} or {WEIGHTS_INDEX}")
    headers = {name: safetensors_header(directory / name) for name in index_files(where)}
    weight_map = read_json(where)["weight_map"]
    lost = [f"{file} lacks {n}" for n, file in weight_map.items() if n not in headers[file]]
    if lost:
        raise UserError(str(where), *some(lost, 5))
    return headers


def index_files(path: Path) -> list[str]:
    """The weight files that an index names, sorted. Raises UserError if it is damaged."""
    weight_map = read_json(path).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(map(is_file_name, weight_map.values()))
    ):
        raise UserError(str(path), "weight_map must map each tensor to a file of this directory")
    return sorted(set(weight_map.values()))


def describe(directory: Path, with_weights: bool = True) -> dict[str, Any]:
    """What a checkpoint is, without opening its weights in a framework.

    with_weights False: without looking at the weight files, which need not be there.
    Returns config (config.json; of a borrowed model as `resolved`), coconut (coconut.json; None for
    a plain Hugging Face directory), model_type, tensors (name to TensorEntry, all shards) and bytes
    (of the weight files).
    Raises UserError: no directory, no or unsupported config.json, a newer format, damaged weights.
    """
    directory = Path(directory)
    _check_in_place(directory)
    if not directory.is_dir():
        problem = "a file, not a directory" if directory.exists() else "no such directory"
        raise UserError(str(directory), f"{problem}; expected a checkpoint directory")
    if not (directory / CONFIG).exists():
        raise UserError(str(directory), f"no {CONFIG}: not a checkpoint directory")
    config = judged(read_json(directory / CONFIG), str(directory / CONFIG))
    coconut = None
    if (directory / COCONUT).exists():
        coconut = read_json(directory / COCONUT)
        version = coconut.get("format_version")
        if type(version) is not int or version < 1:
            raise UserError(
                str(directory / COCONUT), f"format_version: expected a number, got {version!r}"
            )
        if version > FORMAT_VERSION:
            raise UserError(
                str(directory / COCONUT),
                f"format_version {version} is newer than this program's {FORMAT_VERSION}; "
                "update the program",
            )
    elif all(name in config for name in FORK_IDS):
        remedy = f"python convert/torch_to_mlx.py {directory} DIRECTORY"
        raise UserError(str(directory), f"the Qwen fork's, which only convert reads: {remedy}")
    headers = weight_files(directory) if with_weights else {}
    tensors = {name: entry for header in headers.values() for name, entry in header.items()}
    if headers and ADAPTERS not in headers:
        check_tensors(config, tensors, str(directory))
    return {
        "config": config,
        "coconut": coconut,
        "model_type": config["model_type"],
        "tensors": tensors,
        "bytes": sum((directory / name).stat().st_size for name in headers),
    }


def _seal(directory: Path) -> None:
    """Record size and sha256 of every file, and put all of it on disk."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    write_json(
        directory / CHECKSUMS,
        {
            "files": {
                path.relative_to(directory).as_posix(): {
                    "bytes": path.stat().st_size,
                    "sha256": sha256(path),
                }
                for path in paths
            }
        },
    )
    for path in [*paths, *(path for path in directory.rglob("*") if path.is_dir()), directory]:
        flush(path)


def _put_in_place(partial: Path, directory: Path) -> None:
    # POSIX renames no directory over a full one. Between the two renames only the hidden old one
    # exists; `recover` gives it its name back if the process dies there.
    replaced = hidden(directory, "replaced")
    is_new = not directory.exists()
    if not is_new:
        directory.rename(replaced)
    try:
        partial.rename(directory)
    except OSError:
        if not is_new:
            replaced.rename(directory)
        raise
    flush(directory.parent)
    if not is_new:
        shutil.rmtree(replaced)


def recover(run_dir: Path) -> None:
    """Give a replaced directory its name back where the replacement never came; a writer's part."""
    for path, name, state in _left_behind(run_dir):
        if state == "replaced" and not (run_dir / name).exists():
            try:
                path.rename(run_dir / name)
            except OSError as error:
                raise UserError(
                    str(path), f"cannot be renamed back to {name}: {error.strerror}"
                ) from error


def _check_in_place(directory: Path) -> None:
    """Raise UserError where a checkpoint is gone because it was just being replaced."""
    found = [] if directory.exists() else sorted(directory.parent.glob(".*.replaced-*"))
    for path in found:
        if (match := _HIDDEN_NAME.fullmatch(path.name)) and match[1] == directory.name:
            raise UserError(
                str(directory),
                f"was being replaced; if its run was killed, start it again, or rename {path.name}"
                f" to {directory.name}",
            )


def _left_behind(run_dir: Path) -> list[tuple[Path, str, str]]:
    """(path, name, state) of hidden entries that no running process is at work on."""
    try:
        entries = sorted(Path(run_dir).iterdir())
    except OSError:
        return []
    found = [(path, _HIDDEN_NAME.fullmatch(path.name)) for path in entries]
    return [(path, m[1], m[2]) for path, m in found if m and _is_left(path, m[3], int(m[4]))]


def _is_left(path: Path, host: str | None, pid: int) -> bool:
    if host not in (None, HOST):
        # What goes on there cannot be seen from here; but nobody else writes checkpoints into a
        # directory that this process works in.
        return path.is_dir() and is_held(path.parent)
    return path not in _being_written if pid == os.getpid() else not is_running(pid)
