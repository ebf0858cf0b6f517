"""The files of `chains` are what its maker makes, and their splits are alike."""

from __future__ import annotations

import random

from tiny import REPOSITORY

from coconut.batches.questions import DataSet
from coconut.config.reading import check_config
from coconut.tasks.questions import chains

TABLE, HIDDEN = chains.operation(random.Random(0))
LARGEST_GAP = 0.01
"""Between shares of items that need a hidden entry; observed 0.004."""


def needed(item) -> set[tuple[int, int]]:
    """The entries of the table behind an item's answer."""
    left, *others = map(int, item["question"].split())
    entries = set()
    for right in others:
        entries.add((left, right))
        left = TABLE[left][right]
    assert item["groundtruth"] == str(left)
    return entries


def share(items) -> float:
    """Of the items, those that need a hidden entry."""
    return sum(bool(needed(item) & HIDDEN) for item in items) / len(items)


def test_the_files_are_as_made_and_share_no_question():
    files = [chains.read(REPOSITORY / chains.FILES[part]) for part in ("train", "test")]
    assert tuple(files) == chains.make()
    questions = [{item["question"] for item in items} for items in files]
    assert [len(q) for q in questions] == [chains.N_TRAIN, chains.N_TEST]
    assert not questions[0] & questions[1]


def test_every_split_needs_hidden_entries_equally_often(tmp_path):
    keys = {"method": "sft", "dataset_name": "chains", "model_id": "any", "validation_items": 500}
    data = DataSet(check_config(keys | {"save_path": str(tmp_path)}))
    shares = [
        share([item for _, item in data.numbered(split)])
        for split in ("train", "validation", "test")
    ]
    assert max(shares) - min(shares) < LARGEST_GAP


def test_no_written_rationale_shows_a_hidden_entry():
    written = [item for item in chains.make()[0] if "rationales" in item]
    assert len(written) == chains.N_WRITTEN and share(written) == 0
