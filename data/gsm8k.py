"""GSM8K: from the original JSONL, or from iCoT / GSM8K-Aug text lines, to our JSON or those lines.

    python data/gsm8k.py train.jsonl --exclude icot_valid.txt --out data/gsm_train.json
    python data/gsm8k.py test.jsonl --format text --out test.txt

A text line is `question||step step … #### answer`. A step is an annotation `<<48/2=24>>` as it
stands in the solution. An item without annotations has no steps: `[]` in our JSON. Coconut's own
conversion splits the empty text and so keeps one empty step; `--empty-step` does the same.
"""

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path

if not __package__:  # run as `python data/gsm8k.py`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from coconut.errors import UserError
from coconut.tasks.files import Item, atomic, command, field, read_lines, read_records, write_items

_ANNOTATION = re.compile(r"<<.*?>>")


def from_solution(question: str, solution: str, where: str) -> Item:
    """An item from an original question and its solution, which ends in `#### ANSWER`."""
    reasoning, mark, answer = solution.rpartition("####")
    if not mark or not answer.strip():
        raise UserError(where, "field 'answer' must end in '#### ' and the answer")
    return {
        "question": question,
        "answer": answer.strip(),
        "steps": _ANNOTATION.findall(reasoning),
    }


def from_line(line: str, where: str) -> Item:
    """An item from a text line `question||step step … #### answer`."""
    question, bars, rest = line.partition("||")
    steps, mark, _ = rest.partition("##")
    answer = rest.rpartition("##")[2].strip()
    if not (question.strip() and bars and mark and answer):
        raise UserError(where, "expected 'question||steps #### answer'")
    return {
        "question": question,
        "answer": answer,
        # Split at single spaces, as published; only a wholly empty text means no step.
        "steps": steps.strip().split(" ") if steps.strip() else [],
    }


def to_line(item: Item, where: str) -> str:
    """The text line of an item. Raises UserError if it could not be read back as it was."""
    line = f"{item['question']}||{' '.join(item['steps'])} #### {item['answer']}"
    if "\n" in line or from_line(line, where) != item:
        raise UserError(
            where,
            "cannot be a text line: a question with '||' or a line end, or a step with a space "
            "or '##'; use --format json",
        )
    return line


def read(path: Path | str) -> list[Item]:
    """The items of an original `.jsonl` file, or of a text file in iCoT's form.

    Raises UserError naming file and line of an item that is broken.
    """
    if Path(path).suffix != ".jsonl":
        return [from_line(line, where) for where, line in read_lines(path)]
    items = []
    for where, raw in read_records(path):
        question, solution = (field(raw, name, str, where) for name in ("question", "answer"))
        items.append(from_solution(question, solution, where))
    return items


def without(items: Iterable[Item], excluded: Iterable[Item]) -> list[Item]:
    """The items whose exact question is not among the excluded ones' (validation out of train)."""
    questions = {item["question"] for item in excluded}
    return [item for item in items if item["question"] not in questions]


def main() -> None:
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(prog="data/gsm8k.py", description="Convert GSM8K files.")
    parser.add_argument("source", metavar="FILE", help="original .jsonl, or text lines")
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--format", choices=("json", "text"), default="json", help="(%(default)s)")
    parser.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="FILE",
        help="leave out items whose question is in these files",
    )
    parser.add_argument(
        "--empty-step", action="store_true", help="one empty step where there is none (published)"
    )
    args = parser.parse_args()
    if args.empty_step and args.format == "text":
        parser.error("--empty-step is for --format json: a text line is the same either way")
    items = read(args.source)
    kept = without(items, (item for path in args.exclude for item in read(path)))
    if not kept:
        raise UserError(args.source, "no item is left after --exclude; nothing written")
    if args.format == "text":
        lines = [to_line(item, f"{args.source}: {item['question'][:40]!r}") for item in kept]
        with atomic(args.out) as file:
            file.writelines(f"{line}\n" for line in lines)
    else:
        steps = [""] if args.empty_step else []
        write_items(args.out, ({**item, "steps": item["steps"] or steps} for item in kept))
    left_out = f" | {len(items) - len(kept):,} left out" if args.exclude else ""
    print(f"wrote {len(kept):,} items | {args.out}{left_out}")


if __name__ == "__main__":
    command(main)
