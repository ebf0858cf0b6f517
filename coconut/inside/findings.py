"""What an inspection finds: thoughts, stops and readings of one question."""

from dataclasses import asdict, dataclass
from typing import Any

from coconut.batches.curriculum import Row
from coconut.inside.graph import Graph, sentences
from coconut.text.tokenizer import START, Tokenizer

READINGS = {
    "step": "the subject of the step it would print next",
    "fact": "what it would say the asked name is",
    "answer": "what it would give as the answer",
    "thought": "what the output head reads in the thought itself",
}
"""Where the next concept is read. thought: nothing is forced; in the vector that is fed back, the
concept that ` is a` would go on with (of a word of many tokens, its first). The others force a text
behind the thoughts. step: `Every`, as in the Coconut paper
(arXiv 2412.06769, section 5); without thoughts the step's first word. fact: `NAME is a`.
answer: `### NAME is a`."""


@dataclass(frozen=True)
class Thought:
    """One thought: the vector that takes the place of a latent's embedding.

    number: from 1. top: the most probable tokens if the output head reads it, with probabilities.
    norm: its length; norm_ratio: in mean lengths of a token's embedding. cosines: with the thoughts
    before it, in order. attention (segments): what its latent takes from each part of the prompt,
    summed over the part's tokens and then mean over layers and heads; attention_max: the largest of
    any layer and head, found at attention_at (layer, head), from 0; attention_heads
    (layers, heads, segments): all of them.
    """

    number: int
    top: list[tuple[str, float]]
    norm: float
    norm_ratio: float
    cosines: list[float]
    attention: list[float]
    attention_max: list[float]
    attention_at: list[tuple[int, int]]
    attention_heads: list[list[list[float]]]


@dataclass(frozen=True)
class Stop:
    """What the model answers if it stops after n_thoughts.

    text: all it generates. chain, answer: its parts; chain_is_stated: for each line of the chain,
    whether the question says it, None of a line whose subject goes without saying. certainty: the
    probability of the answer's tokens given everything before them; None without an answer.
    is_finished: it ended by itself. is_correct: None if the right answer is not known. choices: for
    ProsQA the probability of each choice as the answer, forced right behind the thoughts (all
    tokens of `### NAME is a CHOICE.`), in the question's order. is_trained: the checkpoint's method
    trains answers from this many.
    """

    n_thoughts: int
    text: str
    chain: list[str]
    chain_is_stated: list[bool | None]
    answer: str
    certainty: float | None
    is_finished: bool
    is_correct: bool | None
    choices: tuple[float, float] | None
    is_trained: bool


@dataclass(frozen=True)
class Reading:
    """The latent tree: which concept comes next, were the text to begin with a lead.

    kind: one of READINGS. leads: the forced text after 0, 1, ... thoughts. lead_probability: that
    the model would begin so by itself; where nothing is forced, what all concepts have together.
    values[k][node]: probability of each node's word given the lead; words outside the graph have
    the rest. is_trained: the checkpoint's method trains such text behind thoughts.
    """

    kind: str
    leads: list[str]
    lead_probability: list[float]
    values: list[list[float]]
    is_trained: bool


@dataclass(frozen=True)
class Inspection:
    """Everything that can be seen of one question; `as_json` makes plain data of it.

    idx: the item's number in its file, None for a question typed in. gold: the right answer, None
    if not known. segments: the parts of the prompt that attention is summed over: the sentences,
    the start marker, then the thoughts. graph: None if the question is not of ProsQA's form.
    warnings: of the question, why its answers mean nothing. notes: of the checkpoint, what to know
    before believing the numbers.
    """

    question: str
    idx: int | None
    gold: str | None
    segments: list[str]
    n_sentences: int
    graph: Graph | None
    thoughts: list[Thought]
    stops: list[Stop]
    readings: list[Reading]
    warnings: list[str]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, numbers and strings."""
        found = asdict(self)
        if self.graph is not None:
            found["graph"] |= {
                "right": self.graph.right,
                "names": self.graph.names,
                "path": self.graph.path(),
            }
        return found


def segments_of(tokenizer: Tokenizer, question: str, row: Row) -> tuple[list[str], list[int]]:
    """(segments, the segment of each token of the prompt; -1 for none)."""
    parts = sentences(question)
    starts, at = [], 0
    for part in parts:
        at = question.index(part, at)
        starts.append(at)
        at += len(part)
    tokens = row.ids[: row.first_latent - 1] if row.n_latents else row.ids
    of_token, before = [], 0
    for i in range(len(tokens)):
        end = len(tokenizer.decode(tokens[: i + 1]))
        text = question[before:end]
        # A token's white space belongs to the word behind it.
        first_word = before + len(text) - len(text.lstrip())
        of_token.append(sum(start <= first_word for start in starts) - 1)
        before = end
    if not row.n_latents:
        return parts, of_token
    n = len(parts)
    segments = [*parts, START, *(f"thought {i + 1}" for i in range(row.n_latents))]
    of_token += [*range(n, n + 1 + row.n_latents), -1]
    return segments, of_token
