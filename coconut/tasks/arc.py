"""ARC: from JSON lines in either published layout to our list of questions with options.

    python data/arc.py ARC-Challenge-Dev.jsonl --out data/arc_valid.json

Layouts: the Allen Institute's (`question.stem`, `question.choices` = objects with text and label)
and the hub's (`question`, `choices` = lists of texts and of labels). Labels are A to E or 1 to 5.
"""

import argparse
from pathlib import Path
from typing import Any

from coconut.errors import UserError
from coconut.tasks.files import Item, field, read_records, write_items


def convert(raw: Any, where: str) -> Item:
    """One item: question, options (texts in order), answer (the right one's text), label (its key).

    Raises UserError naming `where` if a field is missing, broken, or the key fits no label.
    """
    if isinstance(raw, dict) and isinstance(raw.get("question"), dict):
        question = field(raw["question"], "stem", str, where)
        choices = field(raw["question"], "choices", list, where)
        options = [field(choice, "text", str, where) for choice in choices]
        labels = [field(choice, "label", str, where) for choice in choices]
    else:
        question = field(raw, "question", str, where)
        choices = field(raw, "choices", dict, where)
        options, labels = (field(choices, name, list, where) for name in ("text", "label"))
        if not all(isinstance(text, str) and text for text in options + labels):
            raise UserError(where, "field 'choices' must hold strings that are not empty")
    if len(options) != len(labels) or len(set(labels)) != len(labels):
        raise UserError(where, "each choice needs a text and a label of its own")
    label = field(raw, "answerKey", str, where)
    if label not in labels:
        raise UserError(where, f"field 'answerKey': {label!r} is none of {', '.join(labels)}")
    return {
        "question": question,
        "options": options,
        "answer": options[labels.index(label)],
        "label": label,
    }


def read(path: Path | str) -> list[Item]:
    """All items of a file. Raises UserError naming file and line of an item that is broken."""
    return [convert(raw, where) for where, raw in read_records(path)]


def main() -> None:
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(prog="data/arc.py", description="Convert an ARC file.")
    parser.add_argument("source", metavar="FILE.jsonl", help="JSON lines in either layout")
    parser.add_argument("--out", required=True, metavar="FILE", help="the JSON file to write")
    args = parser.parse_args()
    count = write_items(args.out, read(args.source))
    print(f"wrote {count:,} items | {args.out}")
