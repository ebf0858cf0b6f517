"""The data sets LaTRO, SFT and the pre-experiment read: one file here is one data set.

A file NAME.py is the data set `dataset_name: NAME`. docs/data_sets.md walks through one. It has

    FILES: dict[str, str]         path of "train", of "test" and, if there is one, of "validation"
    HOW: str                      one line: how to get those files
    read(path) -> list[item]      the items of a file: dicts with question and groundtruth, and
                                  rationales if people wrote some, all of them texts
    prompt(item, chat) -> str     what the user asks; chat: it goes into a chat template
    response(item) -> str         the right answer as the model is to say it
    answer(output, item) -> str   the answer in a text, normalised; "" if it holds none

and may have

    sft_prompt(item, chat)        the same for SFT; otherwise prompt
    sft_response(item)            what SFT trains on; otherwise the rationale, if any, on
                                  lines of its own, and the response
    sft_published_prompt(...)     how the published code asks an SFT model; otherwise sft_prompt
    released(output, item)        whether it is right by the published rule; otherwise by `answer`
    SHOTS: str, N_SHOTS: int      worked examples before the question (NAME_8shot), and how many

An output is right if its `answer` is that of the item's own `response`.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from types import ModuleType

from coconut.errors import UserError

REQUIRED = ("FILES", "HOW", "read", "prompt", "response", "answer")
_SHOT_NAME = re.compile(r"(.+)_(\d+)shot")


def names() -> list[str]:
    """The data sets there are: the files of this package."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def parse_name(dataset_name: str) -> tuple[str, int]:
    """(data set, worked examples in front) of a name such as gsm8k, gsm8k_0shot, gsm8k_8shot."""
    found = _SHOT_NAME.fullmatch(dataset_name)
    return (found[1], int(found[2])) if found else (dataset_name, 0)


def _files(module: ModuleType) -> dict[str, str]:
    return getattr(module, "FILES", {"train": "", "test": ""})


def load(name: str) -> ModuleType:
    """The module of a data set. Raises UserError if it lacks something every data set has."""
    module = importlib.import_module(f"data.latro.{name}")
    missing = [part for part in REQUIRED if not hasattr(module, part)]
    missing += [f"FILES[{part!r}]" for part in ("train", "test") if part not in _files(module)]
    if missing:
        raise UserError(
            str(module.__file__), f"lacks {', '.join(missing)}; docs/data_sets.md shows a whole one"
        )
    return module
