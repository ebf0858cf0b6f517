"""Chains of a secret operation: a made task on which a rationale is needed and can be discovered.

A question is four digits a b c d; the answer is ((a∘b)∘c)∘d for a random table ∘ of 100 entries,
and the rationale names the two results between. Rationales are written only for items that need no
entry of a hidden fifth of the table, so supervised learning cannot learn those entries: a model
has to try results until they make the known answers likely.

`python -m coconut.tasks.questions.chains` writes the files, below the working folder.
"""

import json
import random
from pathlib import Path

from coconut.tasks.files import Item, atomic, field, read_records

FILES = {"train": "data/chains_train.jsonl", "test": "data/chains_test.jsonl"}
HOW = "python -m coconut.tasks.questions.chains"
N_TRAIN, N_TEST, N_WRITTEN, N_SKIPPED = 4000, 500, 600, 500
"""Items, how many of train have a written rationale, and how many are in neither file."""


def read(path: Path | str) -> list[Item]:
    """Items of a JSONL file; rationales is there where it was written."""
    items = []
    for where, raw in read_records(path):
        item = {name: field(raw, name, str, where) for name in ("question", "groundtruth")}
        if "rationales" in raw:
            remedy = "write one, or leave it out of the item"
            item["rationales"] = field(raw, "rationales", str, where, remedy)
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


def operation(rng: random.Random) -> tuple[list[list[int]], set[tuple[int, int]]]:
    """(the table, the fifth of its entries that no rationale shows)."""
    table = [[rng.randrange(10) for _ in range(10)] for _ in range(10)]
    return table, set(rng.sample([(a, b) for a in range(10) for b in range(10)], 20))


def make(seed: int = 0) -> tuple[list[Item], list[Item]]:
    """(train, test): different questions, equal shares of which need a hidden entry.

    The first N_WRITTEN that need none have rationales and are of train.
    """
    rng = random.Random(seed)
    table, hidden = operation(rng)
    questions = [tuple(map(int, f"{n:04d}")) for n in rng.sample(range(10_000), 10_000)]
    written: list[dict[str, str]] = []
    others: list[dict[str, str]] = []
    needy = set()
    for a, b, c, d in questions:
        first = table[a][b]
        second = table[first][c]
        item = {"question": f"{a} {b} {c} {d}", "groundtruth": str(table[second][d])}
        if hidden & {(a, b), (first, c), (second, d)}:
            needy.add(item["question"])
        elif len(written) < N_WRITTEN:
            written.append(item | {"rationales": f"{first} {second}"})
            continue
        others.append(item)
    # Until the written ones are complete, all others need a hidden entry: few of those are kept.
    end = N_SKIPPED + N_TRAIN - N_WRITTEN
    train = written + others[N_SKIPPED:end]
    rng.shuffle(train)
    # By kind: the written ones make train's share smaller than that of all questions.
    n_needy = round(N_TEST * sum(item["question"] in needy for item in train) / N_TRAIN)
    room = {True: n_needy, False: N_TEST - n_needy}
    test = []
    for item in others[end:]:
        kind = item["question"] in needy
        if room[kind]:
            room[kind] -= 1
            test.append(item)
    return train, test


if __name__ == "__main__":
    for name, items in zip(("train", "test"), make(), strict=True):
        text = "".join(json.dumps(item) + "\n" for item in items)
        with atomic(FILES[name]) as file:
            file.write(text)
