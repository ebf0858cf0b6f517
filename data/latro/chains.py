"""Chains of a secret operation: a made task on which a rationale is needed and can be discovered.

A question is four digits a b c d; the answer is ((a∘b)∘c)∘d for a random table ∘ of 100 entries,
and the rationale names the two results between. Rationales are written only for items that need no
entry of a hidden fifth of the table, so supervised learning cannot learn those entries: a model
has to try results until they make the known answers likely.

`python -m data.latro.chains` writes the files.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from data.files import Item, field, parse_json, read_lines

FILES = {"train": "data/chains_train.jsonl", "test": "data/chains_test.jsonl"}
HOW = "python -m data.latro.chains"
N_TRAIN, N_TEST, N_WRITTEN = 4000, 500, 600
"""Items, and how many of train have a written rationale."""


def read(path: Path | str) -> list[Item]:
    """Items of a JSONL file; rationales is there where it was written."""
    items = []
    for where, line in read_lines(path):
        raw = parse_json(line, where)
        item = {name: field(raw, name, str, where) for name in ("question", "groundtruth")}
        if "rationales" in raw:
            item["rationales"] = field(raw, "rationales", str, where)
        items.append(item)
    return items


def prompt(item: Item, chat: bool) -> str:
    """The digits and a colon."""
    return item["question"] + ":"


def response(item: Item) -> str:
    """The answer behind an equals sign."""
    return f"={item['groundtruth']}"


def answer(output: str, item: Item) -> str:
    """What stands behind the last equals sign."""
    return output.rpartition("=")[2].strip() if "=" in output else ""


def make(seed: int = 0) -> tuple[list[Item], list[Item]]:
    """(train, test): different questions; the first N_WRITTEN of train have rationales."""
    rng = random.Random(seed)
    table = [[rng.randrange(10) for _ in range(10)] for _ in range(10)]
    hidden = set(rng.sample([(a, b) for a in range(10) for b in range(10)], 20))
    questions = [tuple(map(int, f"{n:04d}")) for n in rng.sample(range(10_000), 10_000)]
    items, written = [], []
    for a, b, c, d in questions:
        first = table[a][b]
        second = table[first][c]
        item = {"question": f"{a} {b} {c} {d}", "groundtruth": str(table[second][d])}
        if len(written) < N_WRITTEN and not hidden & {(a, b), (first, c), (second, d)}:
            written.append(item | {"rationales": f"{first} {second}"})
        else:
            items.append(item)
    train = written + items[N_TEST : N_TEST + N_TRAIN - N_WRITTEN]
    rng.shuffle(train)
    return train, items[:N_TEST]


if __name__ == "__main__":
    for name, items in zip(("train", "test"), make(), strict=True):
        text = "".join(json.dumps(item) + "\n" for item in items)
        (Path(__file__).parents[2] / FILES[name]).write_text(text, encoding="utf-8")
