"""From generated text to answer and chain, and whether they are right.

Ours read the generated text alone; `published_answer` and `published_cot` keep the official rule,
which reads prompt and generation together, for comparison with published figures.
"""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from coconut.tasks.graphs import distances
from coconut.text.tokenizer import MARKERS

_ANSWER_SIGN = re.compile("#{3,}")
_NUMBER = re.compile(r"[-+]?(\d+(,\d+)*(\.\d*)?|\.\d+)", re.ASCII)
_SENTENCE = re.compile(r"(Every )?([^\W_]+) is a ([^\W_]+)\.")

# Coconut paper (arXiv 2412.06769), section 5.1; the last two are for text without a chain.
OUTCOMES = (
    "Correct Path",
    "Longer Path",
    "Hallucination",
    "Wrong Target",
    "Correct Label",
    "Incorrect Label",
)


def published_answer(text: str) -> str:
    """The answer by the official rule: after the last `#`, else the whole text.

    text: prompt and generation. Also the official form of a gold answer.
    """
    return text.rsplit("#", 1)[-1].replace(",", "").strip()


def published_cot(text: str) -> str:
    """The chain by the official rule: from the second line of the text to the first `#`."""
    return text.partition("\n")[2].split("#", 1)[0].strip()


def extract(text: str) -> tuple[str, str]:
    """(answer, chain) of a generated text, prompt not included.

    The answer follows the last `###`, and is empty without one; the chain stands before the first.
    Latent markers are taken out of both.
    """
    for marker in MARKERS:
        text = text.replace(marker, "")
    parts = _ANSWER_SIGN.split(text)
    return (parts[-1].strip() if len(parts) > 1 else ""), parts[0].strip()


def exact_match(answer: str, gold: str) -> bool:
    """The same string but for commas and outer spaces; an empty answer is wrong."""
    answer = _bare(answer)
    return answer != "" and answer == _bare(gold)


def numeric_match(answer: str, gold: str) -> bool:
    """The same number (5.0 is 5, 1,450 is 1450); what is no number must match exactly."""
    if _NUMBER.fullmatch(answer.strip()) and _NUMBER.fullmatch(gold.strip()):
        return Decimal(_bare(answer)) == Decimal(_bare(gold))
    return exact_match(answer, gold)


def cot_match(chain: str, remaining_steps: Sequence[str]) -> bool:
    """Whether the chain is, word for word, the steps not yet replaced by latents."""
    return chain.strip() == "\n".join(remaining_steps).strip()


def classify_chain(
    item: Mapping[str, Any], chain_lines: Sequence[str], answer: str, n_hidden: int = 0
) -> str:
    """The outcome class of a printed ProsQA chain: one of OUTCOMES.

    item: its edges, idx_to_symbol, root and target. n_hidden: steps this stage has put into
    latents; then the printed chain may start anywhere the root leads to, and the shortest way there
    completes it. With a chain its path alone decides; without one, the answer. Any valid path
    counts, not only the one in `steps`.
    """
    lines = [line.strip() for line in chain_lines if line.strip()]
    symbols, edges = item["idx_to_symbol"], {(parent, child) for parent, child in item["edges"]}
    root, target = item["root"], item["target"]
    if not lines:
        gold = f"{symbols[root]} is a {symbols[target]}."
        return "Correct Label" if exact_match(answer, gold) else "Incorrect Label"
    path = _path(lines, {symbol: index for index, symbol in enumerate(symbols)}, edges)
    hops = distances(edges, [root])
    if not path or path[0] not in (hops if n_hidden else {root}):
        return "Hallucination"
    if path[-1] != target:
        return "Wrong Target"
    length = hops[path[0]] + len(path) - 1
    return "Correct Path" if length == hops[target] else "Longer Path"


def _bare(text: str) -> str:
    return text.replace(",", "").strip()


def _path(
    lines: Sequence[str], index_of: Mapping[str, int], edges: set[tuple[int, int]]
) -> list[int]:
    """The nodes the sentences walk along; empty if one is no edge or does not join the last."""
    path: list[int] = []
    has_parent = {child for _, child in edges}
    for line in lines:
        sentence = _SENTENCE.fullmatch(line)
        if sentence is None:
            return []
        parent, child = index_of.get(sentence[2], -1), index_of.get(sentence[3], -1)
        # Concepts are said with Every, names (nodes without parents) without.
        if (parent, child) not in edges or bool(sentence[1]) != (parent in has_parent):
            return []
        if path and path[-1] != parent:
            return []
        path = [*(path or [parent]), child]
    return path
