"""ARC-Challenge for LaTRO: science questions with three to five options (Clark et al. 2018)."""

import re
from pathlib import Path

from coconut.tasks import arc
from coconut.tasks.files import Item

FILES = {
    part: f"data/cache/ARC-Challenge-{name}.jsonl"
    for part, name in (("train", "Train"), ("validation", "Dev"), ("test", "Test"))
}
HOW = (
    "unpack the archive of https://allenai.org/data/arc and put ARC-Challenge-Train.jsonl, -Dev and"
    " -Test into data/cache"
)

_DELIMITER = re.compile(r"the\s+answer\s+is", re.IGNORECASE)


def read(path: Path | str) -> list[Item]:
    """Items of a JSONL file in either published layout; groundtruth is the right option's text."""
    return [
        {"question": i["question"], "options": i["options"], "groundtruth": i["answer"]}
        for i in arc.read(path)
    ]


def _asked(item: Item) -> str:
    # The options as Python writes a list: so they were published.
    return f"{item['question']}\nOptions: {item['options']}\n"


def prompt(item: Item, chat: bool) -> str:
    """Question, options and the request to think step by step."""
    if chat:
        return (
            f"Question: {_asked(item)}Let's think step by step first then print your answer like"
            " 'The answer is (one of the options)'."
        )
    return f"Question: {_asked(item)}Answer: Let's think step by step."


def response(item: Item) -> str:
    """The right option as a sentence."""
    return f"The answer is {item['groundtruth']}."


def sft_prompt(item: Item, chat: bool) -> str:
    """Question, options and the form of the answer, which stands alone."""
    return (
        f"{_asked(item)}Choose one from available options and return your answer like"
        f" `The answer is {{final_answer}}`.{'' if chat else chr(10)}"
    )


def sft_published_prompt(item: Item, chat: bool) -> str:
    """What the published evaluation asks an SFT model; the format's wording is ours."""
    if not chat:
        return f"Question: {_asked(item)}Answer:"
    return (
        "Answer strictly with one of the options, and write no text after it. Example:\n"
        "Question: (the question)\nOptions: [option1, option2, option3]\n"
        f"The answer is: (one of the options).\n\nQuestion: {_asked(item)}"
    )


def answer(output: str, item: Item) -> str:
    """The option an output names, in lower case; "" if it names none.

    The first option after the last "the answer is"; in an output without these words, the last
    option of all. An option counts as whole words only, and a longer one before one inside it.
    """
    *_, tail = _DELIMITER.split(output)
    named = [_plain(found[0]) for found in _options(item).finditer(tail.casefold())]
    if not named:
        return ""
    return named[-1] if tail == output else named[0]


def _options(item: Item) -> re.Pattern[str]:
    """Finds options as whole words; neither `heat` in `wheat`, nor `5` in `2.5` or `-5`."""
    texts = sorted({_plain(text) for text in item["options"]}, key=len, reverse=True)
    words = "|".join(r"\s+".join(map(re.escape, text.split())) for text in texts if text)
    return re.compile(rf"(?<![\w-])(?<!\d[.,])(?:{words})(?!\w|-\w|[.,]\d)")


def _plain(option: str) -> str:
    """Lower case, single spaces, no final full stop."""
    return " ".join(option.casefold().split()).rstrip(". ")


_RELEASED_DELIMITER = "the answer is"
_TRIMMED = " '\"[]()."


def released(output: str, item: Item) -> bool:
    """Right by the released rule: the right option is part of the sentence that gives the answer.

    So `heat` is right where `heat energy` was said, and an option with a full stop inside is cut.
    """
    gold = item["groundtruth"].lower().strip().rstrip(".")
    if not output:
        return False
    sentences = [s for s in output.lower().split(".") if _RELEASED_DELIMITER in s]
    if sentences:
        said = sentences[0].rpartition(_RELEASED_DELIMITER)[2].strip().removeprefix(":")
        return gold in said.strip(_TRIMMED)
    return gold in output.lower().strip(_TRIMMED).rpartition(".")[2]
