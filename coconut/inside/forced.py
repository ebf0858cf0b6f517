"""Texts forced behind thoughts: how a tokenizer writes them, how probable a model finds them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from coconut.backend import Backend
from coconut.batches.batch import collate
from coconut.batches.curriculum import Row
from coconut.errors import UserError
from coconut.inside.graph import Graph
from coconut.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Case:
    """What is forced behind the thoughts: lead, then the word of one of the nodes, then tail."""

    lead: str
    nodes: list[int]
    tail: str


def case_of(kind: str, n_thoughts: int, graph: Graph) -> Case:
    """The case of a reading (see READINGS) after n_thoughts."""
    names, asked = graph.names, graph.nodes[graph.asked]
    concepts = [node for node in range(len(graph.nodes)) if node not in names]
    if kind == "step" and n_thoughts == 0:
        return Case("", names, " is a {}.\n")
    return {
        "step": Case("Every", concepts, " is a {}.\n"),
        "fact": Case(f"{asked} is a", concepts, ".\n"),
        "answer": Case(f"### {asked} is a", concepts, "."),
    }[kind]


@dataclass(frozen=True)
class Spelling:
    """A word behind a lead, in tokens.

    forced: tokens that hold nothing of the word. tokens: those of the word. shared: what the first
    of them holds of the lead. inside: the rest of that token's text up to the word's end, if the
    word ends in it and it shares; else empty.
    """

    forced: tuple[int, ...]
    tokens: tuple[int, ...]
    shared: str
    inside: str


def spelled(tokenizer: Tokenizer, case: Case, word: str) -> Spelling:
    """How a tokenizer writes a word behind a lead.

    GPT-2 writes `Every| le|mp|us| is|...`: the lead, then the word's own tokens, whose
    probabilities are multiplied. Our small encoding writes `Every lempus| is a ...`: the lead is
    inside the word's token, so its probability counts among all tokens that share that lead.
    """
    start = f"{case.lead} {word}" if case.lead else word
    ids = tokenizer.encode(start + case.tail.format(word))
    ends = [len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
    n_forced = sum(end <= len(case.lead) for end in ends)
    whole = [i for i, end in enumerate(ends) if end >= len(start)]
    if not whole:
        raise UserError(tokenizer.name, f"does not write {start!r} back as it reads it; repair it")
    n_word = whole[0] + 1 - n_forced
    begins = ends[n_forced - 1] if n_forced else 0
    shared = case.lead[begins:]
    inside = start[len(case.lead) :] if shared and n_word == 1 else ""
    tokens = ids[n_forced : n_forced + n_word]
    return Spelling(tuple(ids[:n_forced]), tuple(tokens), shared, inside)


class Forcing:
    """What a model makes of texts that are forced behind its prompts."""

    def __init__(self, tokenizer: Tokenizer, backend: Backend) -> None:
        self._tokenizer, self._backend = tokenizer, backend
        self._beginning: dict[tuple[str, str], list[int]] = {}

    def probabilities(
        self, prompts: Sequence[Row], graph: Graph, cases: Sequence[Case]
    ) -> list[tuple[float, list[float]]]:
        """For each prompt: probability of its case's lead, and of each word given the lead."""
        # One word behind one lead may be cut into tokens in its own way: (k, tokens before the
        # word) is a prompt of its own. Usually there is one a k.
        groups: list[dict[tuple[int, ...], dict[int, Spelling]]] = []
        for case in cases:
            words = [spelled(self._tokenizer, case, graph.nodes[node]) for node in case.nodes]
            leads = sorted({word.forced for word in words})
            groups.append({x: {i: w for i, w in enumerate(words) if w.forced == x} for x in leads})
        pad_id = self._tokenizer.pad_id
        _, lead_logprobs = self._backend.continuation_logprobs(
            collate(prompts, pad_id), [[lead for lead in group if lead] for group in groups]
        )
        pairs = list(zip(prompts, groups, strict=True))
        longer = [_behind(prompt, lead) for prompt, group in pairs for lead in group]
        if not longer:
            return [(0.0, []) for _ in cases]
        tokens = [[s.tokens for s in same.values()] for group in groups for same in group.values()]
        first, word_logprobs = self._backend.continuation_logprobs(collate(longer, pad_id), tokens)
        found, behind = [], zip(first, word_logprobs, strict=True)
        for group, lead_given in zip(groups, map(iter, lead_logprobs), strict=True):
            log_leads = [
                float(next(lead_given).sum(dtype=np.float64)) if lead else 0.0 for lead in group
            ]
            largest = max(log_leads, default=0.0)
            total, joint = 0.0, {}
            for same, log_lead in zip(group.values(), log_leads, strict=True):
                weight = math.exp(log_lead - largest)
                next_token, given = next(behind)
                total += weight * self.mass(next_token, next(iter(same.values())).shared, "")
                for (i, word), logprobs in zip(same.items(), given, strict=True):
                    if word.inside:
                        p = self.mass(next_token, word.shared, word.inside)
                    else:
                        p = probability(logprobs)
                    joint[i] = weight * p
            values = [joint[i] / total if total else 0.0 for i in range(len(joint))]
            found.append((math.exp(largest) * total, values))
        return found

    def mass(self, logprobs: np.ndarray, shared: str, inside: str) -> float:
        """Probability that the next token's text begins with shared + inside, as a whole word."""
        if not shared and not inside:
            return 1.0
        start = shared + inside
        if (start, inside) not in self._beginning:
            self._beginning[start, inside] = [
                i
                for i, text in enumerate(self._vocabulary)
                if text.startswith(start) and not (inside and text[len(start) :][:1].isalnum())
            ]
        tokens = self._beginning[start, inside]
        return float(np.exp(logprobs[tokens].astype(np.float64)).sum())

    @cached_property
    def _vocabulary(self) -> list[str]:
        return [self._tokenizer.decode([i]) for i in range(self._tokenizer.vocab_size)]


def _behind(prompt: Row, tokens: Sequence[int]) -> Row:
    return Row(prompt.idx, [*prompt.ids, *tokens], None, prompt.first_latent, prompt.n_latents)


def probability(logprobs: np.ndarray) -> float:
    """Of tokens one after another; logprobs: each one's, given those before it."""
    return math.exp(float(logprobs.sum(dtype=np.float64)))
