"""ProntoQA: from the official generator's JSON to our three files.

    python data/prontoqa.py 5hop_0shot_random.json --out-dir data

The generator (asaparov/prontoqa) is run for 10,000 items with 5 hops, random order, the fictional
ontology and no few-shot examples. As in Coconut, the split is by order: 9,000 train, 200
validation, 800 test; the question is followed by the query, and the sentences of the chain of
thought are joined two by two to make the steps.
"""

import argparse
import sys
from itertools import islice
from pathlib import Path
from typing import Any

if not __package__:  # run as `python data/prontoqa.py`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from coconut.errors import UserError
from coconut.tasks.files import Item, command, field, parse_json, read_text, write_items

SPLIT = {"train": 9_000, "valid": 200, "test": 800}


def convert(raw: Any, where: str) -> list[Item]:
    """Our items, in order, from the generator's object `example1`, `example2`, …

    Raises UserError naming the file (`where`) and the example that is broken.
    """
    if not isinstance(raw, dict) or not raw:
        raise UserError(where, "expected an object of example1, example2, … that is not empty")
    names = [f"example{number}" for number in range(1, len(raw) + 1)]
    if missing := [name for name in names if name not in raw]:
        raise UserError(
            where,
            f"{missing[0]} is missing: its {len(raw)} examples must be numbered 1 to {len(raw)}; "
            "is it the raw output of the generator?",
        )
    return [_convert_one(raw[name], f"{where} {name}") for name in names]


def _convert_one(example: Any, where: str) -> Item:
    test = field(example, "test_example", dict, where)
    chain = field(test, "chain_of_thought", list, where)
    if not all(isinstance(sentence, str) and sentence for sentence in chain):
        raise UserError(where, "field 'chain_of_thought' must hold sentences")
    answer = field(test, "answer", str, where)
    if answer not in ("True", "False"):
        raise UserError(where, f"field 'answer' must be True or False, got {answer!r}")
    question, query = field(test, "question", str, where), field(test, "query", str, where)
    return {
        "question": f"{question} {query}",
        "answer": answer,
        "steps": [" ".join(chain[i : i + 2]) for i in range(0, len(chain), 2)],
    }


def split(items: list[Item], sizes: dict[str, int], where: str) -> dict[str, list[Item]]:
    """Cut the items by order; what is left over at the end is not used."""
    needed = sum(sizes.values())
    if min(sizes.values()) < 0 or not needed:
        raise UserError("--split", f"sizes must be 0 or more and not all 0, got {sizes}")
    if len(items) < needed:
        raise UserError(
            where, f"holds {len(items):,} items, the split needs {needed:,}; give --split"
        )
    rest = iter(items)
    return {name: list(islice(rest, size)) for name, size in sizes.items()}


def _sizes(text: str) -> dict[str, int]:
    return dict(zip(SPLIT, (int(size) for size in text.split("/")), strict=True))


def main() -> None:
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(
        prog="data/prontoqa.py", description="Convert the official ProntoQA generator's output."
    )
    parser.add_argument("raw", metavar="RAW.json", help="the generator's output")
    parser.add_argument("--out-dir", default="data", metavar="DIR", help="(%(default)s)")
    parser.add_argument(
        "--split",
        type=_sizes,
        default=SPLIT,
        metavar="TRAIN/VALID/TEST",
        help="items of each part, by order (9000/200/800); a part of 0 is not written",
    )
    args = parser.parse_args()
    items = convert(parse_json(read_text(args.raw), args.raw), args.raw)
    for name, part in split(items, args.split, args.raw).items():
        if part:
            path = Path(args.out_dir) / f"prontoqa_{name}.json"
            write_items(path, part)
            print(f"wrote {len(part):,} items | {path}")
    if unused := len(items) - sum(args.split.values()):
        print(f"not used: the last {unused:,} items")


if __name__ == "__main__":
    command(main)
