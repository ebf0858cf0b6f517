"""GSM8K for LaTRO: grade-school mathematics with written solutions (Cobbe et al. 2021).

The eight worked examples of gsm8k_8shot.txt are those of Wei et al. 2022, "Chain-of-Thought
Prompting Elicits Reasoning in Large Language Models" (arXiv 2201.11903, appendix).
"""

import re
import unicodedata
from fractions import Fraction
from pathlib import Path

from coconut.errors import UserError
from coconut.tasks.files import Item, field, read_records, read_text

FILES = {"train": "data/cache/gsm8k_train.jsonl", "test": "data/cache/gsm8k_test.jsonl"}
HOW = "python data/download.py gsm8k-train gsm8k-test"
SHOTS = read_text(Path(__file__).with_name("gsm8k_8shot.txt"))
N_SHOTS = 8

_MARK = "#### "
_DELIMITER = re.compile("the answer is", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\b")
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)|\d+)"
_NUMBER = re.compile(
    # A hyphen behind a word, a bracket or another hyphen is no sign: 10-5 ends in 5.
    r"(?P<sign>(?<![\w)\]-])-[$€£¥₹₩₽]?)?"
    r"(?:"
    rf"(?:(?P<whole>{_WHOLE}) )?(?<![/\d])(?P<over>{_WHOLE})/(?P<under>{_WHOLE})(?![/\d])"
    rf"|(?P<decimal>(?:{_WHOLE}(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{{1,2}}(?!\w))?)"
    r")"
)


_REWRITTEN = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        ("[\u2010-\u2013\u2212\ufe63\uff0d]", "-"),
        # A whole number before a fraction is a part of it.
        ("(?<=\\d)(?=[\u00bc-\u00be\u2150-\u215e]|\\\\[dt]?frac)", " "),
        (
            "[\u00bc-\u00be\u2150-\u215e]",
            lambda found: unicodedata.normalize("NFKC", found[0]).replace("\u2044", "/"),
        ),
        (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2"),
        (r"\\([$%])", r"\1"),
        (r"\{,\}|,\\!", ","),
        # Between groups of three digits: LaTeX's and typographers' spaces, 1'000, 1_000.
        (
            r"(?<=\d)(?:\\[,;:! ]|\\thinspace *|[\u00a0\u2009\u202f'\u2019_])(?=\d{3}(?!\d))",
            ",",
        ),
        (r"(?<=\d)\s*(?:\\times|\\cdot|×|⋅)\s*10\s*\^\s*\{?\s*([-+]?\d+)\s*\}?", r"e\1"),
    )
]
"""What people and models write numbers with, and the plain form of it that `_NUMBER` reads."""


def read(path: Path | str) -> list[Item]:
    """Items of an original file (rationales: the solutions up to the answers), or with steps.

    Those are GSM8K-Aug's and what Coconut reads: a list `steps` or a text `cot` beside the answer.
    """
    items = []
    for where, raw in read_records(path):
        question, solution = (field(raw, name, str, where) for name in ("question", "answer"))
        if "steps" in raw:
            steps = raw["steps"]
            if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
                raise UserError(where, "field 'steps' must be a list of strings")
            rationale, groundtruth = "".join(f"{step}\n" for step in steps if step), solution
            written = {"rationales": rationale} if rationale else {}
            items.append({"question": question, "groundtruth": groundtruth} | written)
            continue
        rationale, mark, groundtruth = solution.partition(_MARK)
        if not mark or not groundtruth.strip():
            raise UserError(where, f"field 'answer' must end in '{_MARK}' and the answer")
        items.append({"question": question, "groundtruth": groundtruth, "rationales": rationale})
    return items


def prompt(item: Item, chat: bool) -> str:
    """The question and the request to think step by step."""
    return item["question"] + (" " if chat else "\n") + "Let's think step by step."


def response(item: Item) -> str:
    """The answer as a sentence."""
    return f"The answer is {item['groundtruth']}."


def sft_prompt(item: Item, chat: bool) -> str:
    """The bare question."""
    return item["question"] + ("" if chat else "\n")


def sft_response(item: Item) -> str:
    """The solution, calculator marks kept, and the answer without a full stop, as published."""
    return f"{item.get('rationales', '')}The answer is {item['groundtruth']}"


def sft_published_prompt(item: Item, chat: bool) -> str:
    """The published evaluation asks an SFT model like any other, not as it was trained."""
    return prompt(item, chat)


def answer(output: str, item: Item) -> str:
    """The number an output states, as a fraction in lowest terms; "" if there is none.

    The first number after the last "the answer is", in any case of letters; if there is none, the
    first in the last \\boxed, else the last number of all. 1/2 is one number, and units, currencies
    and % do not count.
    """
    for pattern, plain in _REWRITTEN:
        output = pattern.sub(plain, output)
    found = None
    for delimiter in (_DELIMITER, _BOXED):
        if found is None and delimiter.search(output):
            found = _NUMBER.search(delimiter.split(output)[-1])
    if found is None:
        found = next(reversed([*_NUMBER.finditer(output)]), None)
    return "" if found is None else _value(found)


def _value(found: re.Match[str]) -> str:
    part = {name: (text or "0").replace(",", "") for name, text in found.groupdict().items()}
    try:
        if found["under"]:
            value = int(part["whole"]) + Fraction(int(part["over"]), int(part["under"]))
        else:
            value = Fraction(part["decimal"])
    # 5/0, and digits beyond what Python reads as a number.
    except (ZeroDivisionError, ValueError):
        return found[0]
    return str(-value if found["sign"] else value)


_RELEASED_DELIMITER = "The answer is"
_RELEASED_NUMBER = re.compile(r"-?[\d,]*\.?\d+")


def released(output: str, item: Item) -> bool:
    """Right by the released rule, which reads 10-5 as -5 and 1/2 as 2, or as 1 after the delimiter.

    Two texts without a number are equal by it.
    """
    ours, theirs = _released_answer(output), _released_answer(item["groundtruth"])
    try:
        return float(ours) == float(theirs)
    except ValueError:
        return ours == theirs


def _released_answer(text: str) -> str:
    _, delimiter, tail = text.rpartition(_RELEASED_DELIMITER)
    found = _RELEASED_NUMBER.findall(tail)[:1] if delimiter else []
    found = found or _RELEASED_NUMBER.findall(text)[-1:]
    return found[0].replace(",", "") if found else ""
