"""Directories: what a kill at any moment leaves, what damage is found, what is kept."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import examples, few
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny import zero_model

from coconut import files
from coconut.checkpoints import checkpoint, safetensors
from coconut.checkpoints.verdict import args_of
from coconut.errors import UserError
from coconut.lock import held

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "models"
NO_PROCESS = 2**22 + 1  # above the largest process number of Linux and macOS


def write(directory: Path, text: str) -> None:
    with checkpoint.write_atomically(directory) as partial:
        files.write_json(partial / "config.json", {"text": text})
        (partial / "state").mkdir()
        (partial / "state" / "moments.bin").write_bytes(text.encode() * 100)


def text_of(directory: Path) -> str:
    return files.read_json(directory / "config.json")["text"]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_finished_block_becomes_a_verified_directory(tmp_path):
    write(tmp_path / "run" / "epoch_01", "new")
    assert names(tmp_path / "run") == ["epoch_01"]
    assert names(tmp_path / "run" / "epoch_01") == ["checksums.json", "config.json", "state"]
    checkpoint.verify(tmp_path / "run" / "epoch_01")


def test_a_failing_block_changes_nothing(tmp_path):
    write(tmp_path / "epoch_01", "old")
    with pytest.raises(ZeroDivisionError), checkpoint.write_atomically(tmp_path / "epoch_01") as p:
        (p / "half").write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path) == ["epoch_01"]
    checkpoint.verify(tmp_path / "epoch_01")


def test_a_full_disk_is_the_users_to_mend_and_changes_nothing(tmp_path):
    write(tmp_path / "epoch_01", "old")
    with (
        pytest.raises(UserError, match=r"epoch_01: cannot be written: No space left"),
        checkpoint.write_atomically(tmp_path / "epoch_01"),
    ):
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == ["epoch_01"] and text_of(tmp_path / "epoch_01") == "old"


def test_writing_over_a_checkpoint_replaces_it_whole(tmp_path):
    write(tmp_path / "epoch_01", "old")
    (tmp_path / "epoch_01" / "stray").write_text("from the old one")
    write(tmp_path / "epoch_01", "new")
    assert names(tmp_path) == ["epoch_01"] and text_of(tmp_path / "epoch_01") == "new"
    assert not (tmp_path / "epoch_01" / "stray").exists()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "epoch_01").write_text("")
    with pytest.raises(UserError, match=r"epoch_01: a file of this name is in the way"):
        write(tmp_path / "epoch_01", "new")


# Each point is a call during which the writing process is shot; before it and after it.
KILL_POINTS = [
    *[("checkpoint._seal", when) for when in ("before", "after")],
    *[("checkpoint.flush", when) for when in ("before", "after")],
    *[("Path.rename", when) for when in ("before", "after", "before second", "after second")],
    ("shutil.rmtree", "before"),
]
WRITER = """
import os, shutil, signal, sys
from pathlib import Path
from coconut import files
from coconut.checkpoints import checkpoint

directory, point, when = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
owner, name = point.split(".")
owner = {"checkpoint": checkpoint, "files": files, "Path": Path, "shutil": shutil}[owner]
original, calls = getattr(owner, name), 0

def shot(*args, **kwargs):
    global calls
    calls += 1
    is_due = calls == (2 if "second" in when else 1)
    if is_due and when.startswith("before"):
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*args, **kwargs)
    if is_due:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

with checkpoint.write_atomically(directory) as partial:
    (partial / "config.json").write_text('{"text": "new"}')
    setattr(owner, name, shot)
"""


@pytest.mark.parametrize("exists", [False, True], ids=["first", "over an old one"])
@pytest.mark.parametrize(("point", "when"), few(KILL_POINTS, 3))
def test_a_killed_writer_leaves_the_old_or_the_new(tmp_path, point, when, exists):
    target = tmp_path / "epoch_01"
    if exists:
        write(target, "old")
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(target), point, when],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    is_reached = exists or (point != "shutil.rmtree" and "second" not in when)
    assert done.returncode == (-signal.SIGKILL if is_reached else 0)
    checkpoint.recover(tmp_path)
    found = checkpoint.checkpoints(tmp_path)
    for path in found:
        checkpoint.verify(path)
    assert [text_of(path) for path in found] in ([["old"], ["new"]] if exists else [[], ["new"]])
    write(tmp_path / "epoch_02", "next")  # clears what was left
    assert names(tmp_path) == [path.name for path in found] + ["epoch_02"]


def test_only_leftovers_of_dead_processes_are_cleared(tmp_path):
    running = tmp_path / f".epoch_02.partial-{os.getppid()}"
    for path in (running, tmp_path / f".epoch_02.partial-{NO_PROCESS}", tmp_path / ".mine"):
        path.mkdir()
    (tmp_path / f".summary.json.partial-{NO_PROCESS}").write_text("{")
    write(tmp_path / "epoch_03", "new")
    assert names(tmp_path) == [running.name, ".mine", "epoch_03"]


def test_a_second_writer_in_the_same_process_spares_the_first(tmp_path):
    with checkpoint.write_atomically(tmp_path / "epoch_01") as partial:
        write(tmp_path / "epoch_02", "new")
        (partial / "config.json").write_text("{}")
    assert names(tmp_path) == ["epoch_01", "epoch_02"]


HERE, ELSEWHERE = files.HOST, "another.host"


@pytest.mark.parametrize("owner", [f"{NO_PROCESS}", f"{HERE}-{NO_PROCESS}"])
def test_a_replacement_cut_short_is_undone_by_the_run_and_named_by_a_reader(tmp_path, owner):
    write(tmp_path / "epoch_01", "old")
    (tmp_path / "epoch_01").rename(left := tmp_path / f".epoch_01.replaced-{owner}")
    for read in (checkpoint.verify, checkpoint.describe):
        with pytest.raises(UserError, match=r"epoch_01: was being replaced.*rename \.epoch_01\.re"):
            read(tmp_path / "epoch_01")
    assert checkpoint.checkpoints(tmp_path) == [] and names(tmp_path) == [left.name]
    checkpoint.recover(tmp_path)
    assert text_of(tmp_path / "epoch_01") == "old"


def test_what_another_machine_writes_is_left_to_it_unless_the_directory_is_ours(tmp_path):
    theirs = [
        f".epoch_{n}.{s}-{ELSEWHERE}-{NO_PROCESS}"
        for n, s in (("01", "replaced"), ("02", "partial"))
    ]
    for name in theirs:
        (tmp_path / name).mkdir()
    write(tmp_path / "epoch_03", "new")
    assert names(tmp_path) == [*theirs, "epoch_03"]
    with held(tmp_path):  # so they are at work there no more
        write(tmp_path / "epoch_04", "new")
    assert names(tmp_path) == ["epoch_01", "epoch_03", "epoch_04"]


def test_only_strict_names_are_checkpoints(tmp_path):
    for name in ("epoch_02", "epoch_10", "epoch_100", "epoch_007", "epoch_1", "epoch_3.bak"):
        (tmp_path / name).mkdir()
    for name in ("xepoch_04", "epoch_٠٧", ".epoch_05.partial-1", "epoch_-1", "epoch_" + "9" * 30):
        (tmp_path / name).mkdir()
    (tmp_path / "epoch_20").write_text("a file")
    found = [path.name for path in checkpoint.checkpoints(tmp_path)]
    assert found == ["epoch_02", "epoch_10", "epoch_100"]
    latest = checkpoint.latest(tmp_path)
    assert latest is not None and checkpoint.epoch_of(latest) == 100
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_pruning_keeps_the_newest_and_the_spared(tmp_path):
    for epoch in range(1, 6):
        write(tmp_path / checkpoint.checkpoint_name(epoch), "x")
    found = checkpoint.checkpoints(tmp_path)
    gone = checkpoint.prune(found, keep=2, spare=[tmp_path / "epoch_02"])
    assert [path.name for path in gone] == ["epoch_01", "epoch_03"]
    assert names(tmp_path) == ["epoch_02", "epoch_04", "epoch_05"]
    with pytest.raises(ValueError, match="at least 1"):
        checkpoint.prune(found, keep=0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), r"state/moments.bin is missing"),
        (lambda p: os.truncate(p, 5), r"state/moments.bin is truncated: 5 of 300 bytes"),
        (lambda p: p.write_bytes(b"z" * 300), r"state/moments.bin is changed: its sha256"),
        (lambda p: p.write_bytes(b"z" * 301), r"state/moments.bin is changed: 301 of 300 bytes"),
        (lambda p: shutil.rmtree(p.parent), r"state/moments.bin is missing"),
    ],
)
def test_verify_names_the_damaged_file(tmp_path, damage, message):
    write(tmp_path / "epoch_01", "new")
    damage(tmp_path / "epoch_01" / "state" / "moments.bin")
    with pytest.raises(UserError, match=message + ".*; copy the checkpoint again, or delete it"):
        checkpoint.verify(tmp_path / "epoch_01")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "", "a\0b", "\ud800"])
def test_a_checksum_list_cannot_lead_out_of_the_directory(tmp_path, name):
    entry = {"bytes": 1, "sha256": ""}
    (tmp_path / "checksums.json").write_text(json.dumps({"files": {name: entry}}))
    with pytest.raises(UserError, match="the file is damaged"):
        checkpoint.verify(tmp_path)


def test_numbers_that_are_not_json_never_reach_a_file(tmp_path):
    files.write_json(tmp_path / "a.json", {"best": 1})
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"best": float("nan")})
    assert files.read_json(tmp_path / "a.json") == {"best": 1} and names(tmp_path) == ["a.json"]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_then(tmp_path, monkeypatch):
    done: list[str] = []
    flush, replace = files.flush, Path.replace

    def flushed(path):
        done.append("folder" if path.is_dir() else "file")
        flush(path)

    def replaced(path, target):
        done.append("name")
        return replace(path, target)

    monkeypatch.setattr(files, "flush", flushed)
    monkeypatch.setattr(Path, "replace", replaced)
    files.write_json(tmp_path / "a.json", {})
    assert done == ["file", "name", "folder"]


# --- safetensors and describe


def weights(path: Path) -> None:
    tensors = {"a": np.zeros((3, 4), np.float32), "b": np.zeros(0, np.int64), "c": np.ones(5, bool)}
    save_file(tensors, path, metadata={"format": "pt"})


def test_the_header_reader_agrees_with_the_library(tmp_path):
    weights(tmp_path / "w.safetensors")
    header = safetensors.safetensors_header(tmp_path / "w.safetensors")
    seen = {name: (entry.dtype, entry.shape) for name, entry in header.items()}
    assert seen == {"a": ("F32", (3, 4)), "b": ("I64", (0,)), "c": ("BOOL", (5,))}


def test_a_weight_file_cut_anywhere_is_found(tmp_path):
    path = tmp_path / "w.safetensors"
    weights(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"w\.safetensors: truncated"):
            safetensors.safetensors_header(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(UserError, match="too long"):
        safetensors.safetensors_header(path)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        f'{{"a": {json.dumps(F32)}, "a": {json.dumps(F32)}}}'.encode(),
        {"a": 1},
        {"a": {**F32, "dtype": "F4"}},
        {"a": {**F32, "shape": [1] * 70 + [2]}},
        {"a": {**F32, "shape": [3]}},
        {"a": {**F32, "shape": [-2]}},
        {"a": {**F32, "shape": [True, 2]}},
        {"a": {**F32, "data_offsets": [8, 0]}},
        {"a": {**F32, "data_offsets": [1, 9]}},
        {"a": F32, "b": F32},
    ],
)
def test_a_header_that_lies_is_rejected(tmp_path, header):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))
    with pytest.raises(UserError, match=r"w\.safetensors"):
        safetensors.safetensors_header(path)


def test_describe_reads_a_published_layout():
    info = checkpoint.describe(GOLDEN / "gpt2-tiny")
    assert info["model_type"] == "gpt2" and info["coconut"] is None
    assert info["tensors"]["transformer.wte.weight"].shape == (200, 64)


SPLIT_OFF = "model.norm.weight"


def sharded(directory: Path) -> Path:
    zero_model(directory, model_type="qwen2")
    files.write_json(directory / "coconut.json", {"format_version": 1, "stage": 2})
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    last = {SPLIT_OFF: weights.pop(SPLIT_OFF)}
    weight_map = {}
    for name, part in (("model-1.safetensors", weights), ("model-2.safetensors", last)):
        save_file(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    files.write_json(directory / checkpoint.WEIGHTS_INDEX, {"weight_map": weight_map})
    return directory


def test_describe_joins_the_shards(tmp_path):
    info = checkpoint.describe(sharded(tmp_path / "m"))
    assert info["tensors"].keys() == args_of(info["config"]).shapes().keys()
    assert info["coconut"]["stage"] == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: shutil.rmtree(d), r"no such directory"),
        (lambda d: (shutil.rmtree(d), d.write_text("")), r"a file, not a directory"),
        (lambda d: (d / "config.json").unlink(), r"no config\.json"),
        (lambda d: (d / "config.json").write_text("{"), r"config\.json: not JSON"),
        (lambda d: (d / "config.json").write_text("[]"), r"expected a JSON object, got list"),
        (
            lambda d: (d / "config.json").write_text('{"model_type": "t5"}'),
            r"'t5' is not supported",
        ),
        (lambda d: (d / "coconut.json").write_text("{}"), r"format_version"),
        (lambda d: (d / "coconut.json").write_text('{"format_version": 9}'), r"newer than this"),
        (lambda d: (d / "model-2.safetensors").unlink(), r"model-2\.safetensors: cannot be read"),
        (lambda d: (d / checkpoint.WEIGHTS_INDEX).unlink(), r"no weights"),
        (
            lambda d: shutil.copy(d / "model-1.safetensors", d / "model-2.safetensors"),
            r"model-2\.safetensors lacks model\.norm\.weight",
        ),
        (
            lambda d: (d / checkpoint.WEIGHTS_INDEX).write_text('{"weight_map": {"a": "../x"}}'),
            r"weight_map must map",
        ),
    ],
)
def test_describe_says_what_is_wrong(tmp_path, damage, message):
    damage(sharded(tmp_path / "m"))
    with pytest.raises(UserError, match=message):
        checkpoint.describe(tmp_path / "m")


LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
KEYS = st.sampled_from(["model_type", "files", "weight_map", "format_version", "a"])
ANY_JSON = st.recursive(LEAF, lambda value: st.lists(value) | st.dictionaries(KEYS, value))


@pytest.fixture(scope="module")
def sealed(tmp_path_factory) -> Path:
    """A checkpoint to copy and damage: sealing flushes the disk, which is slow."""
    directory = sharded(tmp_path_factory.mktemp("sealed") / "epoch_01")
    checkpoint._seal(directory)
    return directory


@pytest.mark.slow
@examples(200)
@given(data=st.data())
def test_random_damage_is_a_user_error_or_nothing(sealed, tmp_path_factory, data):
    directory = shutil.copytree(sealed, tmp_path_factory.mktemp("fuzz") / "epoch_01")
    for _ in range(data.draw(st.integers(1, 3))):
        path = directory / data.draw(st.sampled_from(names(directory)))
        content = path.read_bytes() if path.is_file() else b""
        start = data.draw(st.integers(0, len(content)))
        stop = data.draw(st.integers(start, len(content)))
        how = data.draw(st.sampled_from(["splice", "delete", "directory", "json"]))
        if path.is_dir():
            continue
        path.unlink()
        if how == "directory":
            path.mkdir()
        elif how == "splice":
            path.write_bytes(content[:start] + data.draw(st.binary(max_size=20)) + content[stop:])
        elif how == "json":
            path.write_text(json.dumps(data.draw(ANY_JSON)))
        if not names(directory):
            break
    for read in (checkpoint.verify, checkpoint.describe):
        try:
            read(directory)
        except UserError as error:
            assert "\n" not in str(error) or len(error.problems) > 1
    shutil.rmtree(directory)
