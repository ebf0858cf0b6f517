"""A user's file of questions: the three columns of LaTRO's published interface as a data set.

queries      what the user asks, as text
responses    the right answer as the model is to say it: "The answer is 7."
groundtruth  the answer itself: "7"
rationales   reasoning that people wrote, if there is any
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from coconut.errors import UserError
from coconut.tasks.files import Item, field, read_records


def parts_of(path: str, answer: Callable[[str, Item], str] | None) -> dict[str, Any]:
    """The parts of the data set in a file; answer: how answers are read, otherwise `exact`."""
    name = Path(path)
    other = name.stem.replace("train", "test") if "train" in name.stem else f"{name.stem}_test"
    return {
        "FILES": {"train": path, "test": str(name.with_name(other + name.suffix))},
        "HOW": "name the file with test_path (train_path, val_path)",
        "read": lambda file: _read(file, answer is None),
        "prompt": lambda item, chat: item["question"],
        "response": lambda item: item["responses"],
        "answer": answer or exact,
    }


def _read(path: str, has_answer: bool) -> list[Item]:
    items = []
    for where, raw in read_records(path):
        item = {n: field(raw, n, str, where) for n in ("queries", "responses", "groundtruth")}
        if has_answer and item["groundtruth"].strip() not in item["responses"]:
            raise UserError(
                where,
                "responses does not hold the text of groundtruth, by which answers are compared;"
                " write it there, or name a data set whose answers are read alike"
                " (dataset_name: gsm8k:FILE)",
            )
        if raw.get("rationales") is not None:
            item["rationales"] = field(raw, "rationales", str, where)
        items.append(item | {"question": item.pop("queries")})
    return items


def exact(output: str, item: Item) -> str:
    """What stands in an output where the response has its groundtruth; "" if nothing does.

    Behind the last place of the words before it, up to the end of the line, without those after it.
    """
    before, _, after = (s.strip() for s in item["responses"].partition(item["groundtruth"].strip()))
    if before not in output:
        return ""
    lines = output.rpartition(before)[2].strip() if before else output.strip().rpartition("\n")[2]
    return lines.partition("\n")[0].strip().removesuffix(after).strip()
