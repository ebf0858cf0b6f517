"""What a checkpoint thinks, thought by thought.

Everything here is read from one prompt with 0, 1, ... thoughts:

    question <start> L1 .. Lk <end>            what would the model say if it stopped here?
    question <start> L1 .. Lk <end> LEAD       and which concept, were it to begin with LEAD?
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coconut.backend import Backend, Decoding
from coconut.batches.batch import Batch, collate
from coconut.batches.curriculum import Row, Sample, markers_of, plan, question_row
from coconut.checkpoints.named import checkpoint_config, found_model
from coconut.checkpoints.source import open_source
from coconut.config.keys import WITH_FEEDBACK, WITH_LATENTS
from coconut.errors import UserError
from coconut.inside.graph import Graph, read_graph, sentences
from coconut.inside.known import FORM, knows_only_prosqa, warnings
from coconut.text.answers import exact_match, extract
from coconut.text.tokenizer import END_OF_TEXT, START, Tokenizer

if TYPE_CHECKING:
    from coconut.backend import MakeBackend

_ANSWER_SIGN = re.compile("#{3,}")

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


class Lens:
    """A checkpoint opened to be looked into.

    directory: of the checkpoint, or its name on the hub. n_thoughts: as many as are looked at;
    unless given, those of the checkpoint's own last stage. base: where an adapter's base is, if it
    was moved. own_reading: the tree that says most about the method. Raises UserError as opening a
    checkpoint does.
    """

    def __init__(
        self,
        directory: Path | str,
        make_backend: MakeBackend,
        n_thoughts: int | None = None,
        base: str | None = None,
    ) -> None:
        self.directory = directory = found_model(directory)
        self.config = checkpoint_config(directory, base)
        opened = open_source(self.config)
        made_with = opened.coconut or {}
        self.tokenizer: Tokenizer = opened.tokenizer
        self.stage: int = made_with.get("stage", 0)
        own = plan(self.config, self.stage, self.config.max_latent_stage)[1]
        has_latents = self.config.method in WITH_LATENTS
        if n_thoughts and not has_latents:
            raise UserError(
                str(directory),
                f"was trained by {self.config.method}, which has no thoughts; leave --latents out",
            )
        self.own_thoughts = own
        self.n_thoughts = own if n_thoughts is None else n_thoughts
        by_method = "thought" if self.n_thoughts else "fact"
        self.own_reading = "step" if self._prints_steps else by_method
        self.rule = None if opened.source.feedback is None else opened.source.feedback.rule
        self.has_labelled_thoughts: bool = made_with.get("labelled_thoughts", False)
        self.backend: Backend = make_backend(self.config, opened.source)

    def inspect(
        self,
        question: str,
        gold: str | None = None,
        idx: int | None = None,
        *,
        n_top: int = 10,
        max_new_tokens: int = 128,
    ) -> Inspection:
        """Look at everything. Raises UserError if the question is empty or too long."""
        graph = read_graph(question)
        self.check(question, max_new_tokens, graph)
        if gold is None and graph is not None and graph.right is not None:
            gold = f"{graph.nodes[graph.asked]} is a {graph.nodes[graph.right]}."
        segments, thoughts = self.thoughts(question, n_top)
        return Inspection(
            question=question,
            idx=idx,
            gold=gold,
            segments=segments,
            n_sentences=len(sentences(question)),
            graph=graph,
            thoughts=thoughts,
            stops=self.stops(question, graph, gold, max_new_tokens),
            readings=[] if graph is None else [self.reading(question, graph, k) for k in READINGS],
            warnings=warnings(self.tokenizer, graph),
            notes=self.notes(graph),
        )

    def check(self, question: str, max_new_tokens: int, graph: Graph | None = None) -> None:
        """Raise UserError for a question that cannot be asked.

        graph: the question's, where texts about it are forced behind the thoughts, too.
        """
        if not question.strip():
            raise UserError("question", "is empty; write one")
        n = len(self._prompt(question, self.n_thoughts).ids)
        limit = self.backend.n_positions
        # The prompts of fewer thoughts are no longer than this.
        if limit is not None and n + max_new_tokens > limit:
            raise UserError(
                "question",
                f"{n} tokens with its thoughts and {max_new_tokens} new ones, but the model has"
                f" {limit} positions; shorten it or lower --max-new-tokens",
            )
        if limit is not None and graph is not None and n + self._n_forced(graph) > limit:
            raise UserError(
                "question",
                f"{n} tokens with its thoughts and {self._n_forced(graph)} that are forced behind"
                f" them, but the model has {limit} positions; shorten it",
            )

    def _n_forced(self, graph: Graph) -> int:
        """Tokens of the longest text that any reading or choice forces behind the thoughts."""
        name = graph.nodes[graph.asked]
        texts = [f"### {name} is a {word}." for word in graph.nodes]
        texts += [f"Every {word} is a {word}." for word in graph.nodes]
        return max(len(self.tokenizer.encode(text)) for text in texts)

    def thoughts(self, question: str, n_top: int = 10) -> tuple[list[str], list[Thought]]:
        """(segments of the prompt, every thought of it)."""
        row = self._prompt(question, self.n_thoughts)
        segments, of_token = self._segments(question, row)
        if not row.n_latents:
            return segments, []
        trace = self.backend.trace(collate([row], self.tokenizer.pad_id))
        owner = np.equal.outer(np.arange(len(segments)), of_token).astype(np.float64)
        # (n, L, H, T) x (segments, T): what each latent takes from each segment.
        shares = np.einsum("nlht,st->nlhs", trace.attention.astype(np.float64), owner)
        lengths = np.linalg.norm(trace.thoughts.astype(np.float64), axis=1)
        units = trace.thoughts / np.maximum(lengths, 1e-30)[:, None]
        found = []
        for i, logprobs in enumerate(trace.logprobs):
            top = np.argsort(-logprobs, kind="stable")[:n_top]
            n_heads = shares.shape[2]
            where = shares[i].reshape(-1, len(segments)).argmax(axis=0)
            found.append(
                Thought(
                    number=i + 1,
                    top=[(self.spell(int(t)), float(np.exp(logprobs[t]))) for t in top],
                    norm=float(lengths[i]),
                    norm_ratio=float(lengths[i] / trace.embedding_norms.mean()),
                    cosines=[float(units[i] @ units[j]) for j in range(i)],
                    attention=shares[i].mean(axis=(0, 1)).tolist(),
                    attention_max=shares[i].max(axis=(0, 1)).tolist(),
                    attention_at=[(int(w) // n_heads, int(w) % n_heads) for w in where],
                    attention_heads=shares[i].tolist(),
                )
            )
        return segments, found

    def stops(
        self, question: str, graph: Graph | None, gold: str | None, max_new_tokens: int = 128
    ) -> list[Stop]:
        """The answer after every number of thoughts, from none to all."""
        tokenizer = self.tokenizer
        batch = self._prompts(question)
        decoding = Decoding(max_new_tokens, tokenizer.eos_id)
        written = self.backend.generate(batch, decoding)
        stated = set(sentences(question))
        forced = []
        if graph is not None:
            name = graph.nodes[graph.asked]
            forced = [
                tokenizer.encode(f"### {name} is a {graph.nodes[choice]}.")
                for choice in graph.choices
            ]
        _, logprobs = self.backend.continuation_logprobs(batch, [[new, *forced] for new in written])
        found = []
        for k, (new, (own, *others)) in enumerate(zip(written, logprobs, strict=True)):
            text = tokenizer.decode(new)
            answer, chain = extract(text)
            lines = [line for line in chain.split("\n") if line.strip()]
            start = self._answer_start(new) if answer else 0
            is_finished = new[-1] == tokenizer.eos_id
            found.append(
                Stop(
                    n_thoughts=k,
                    text=text,
                    chain=lines,
                    chain_is_stated=[_is_stated(line, stated) for line in lines],
                    answer=answer,
                    certainty=_probability(own[start:]) if answer else None,
                    is_finished=is_finished,
                    is_correct=None if gold is None else exact_match(answer, gold),
                    choices=(_probability(others[0]), _probability(others[1])) if others else None,
                    is_trained=self.is_trained(k),
                )
            )
        return found

    def reading(self, question: str, graph: Graph, kind: str) -> Reading:
        """The latent tree by one kind of lead (see READINGS), for every number of thoughts."""
        if kind == "thought":
            values = self._named(question, graph)
            return Reading(kind, [""] * len(values), [sum(row) for row in values], values, True)
        cases = [_case(kind, k, graph) for k in range(self.n_thoughts + 1)]
        found = self._forced(question, graph, cases)
        values = [[0.0] * len(graph.nodes) for _ in cases]
        for row, case, (_, probabilities) in zip(values, cases, found, strict=True):
            for node, p in zip(case.nodes, probabilities, strict=True):
                row[node] = p
        is_trained = {
            "step": self._prints_steps,
            "fact": False,
            "answer": True,
        }[kind]
        return Reading(
            kind, [case.lead for case in cases], [p for p, _ in found], values, is_trained
        )

    def _named(self, question: str, graph: Graph) -> list[list[float]]:
        """For k = 0, 1, ...: the probability of each concept in thought k; zeros for k = 0."""
        row = self._prompt(question, self.n_thoughts)
        found = [[0.0] * len(graph.nodes)]
        if not row.n_latents:
            return found
        case = _Case(" is a", [n for n in range(len(graph.nodes)) if n not in graph.names], ".")
        words = [(n, _spelled(self.tokenizer, case, graph.nodes[n])) for n in case.nodes]
        for logprobs in self.backend.trace(collate([row], self.tokenizer.pad_id)).logprobs:
            values = [0.0] * len(graph.nodes)
            for node, word in words:
                is_one = bool(word.inside)
                p = self._mass(logprobs, word.shared, word.inside) if is_one else None
                values[node] = math.exp(logprobs[word.tokens[0]]) if p is None else p
            found.append(values)
        return found

    def is_trained(self, n_thoughts: int) -> bool:
        """Whether the checkpoint's method trains answers from this many thoughts."""
        if self._prints_steps:
            most = self.config.max_latent_stage
            return n_thoughts in (plan(self.config, s, most)[1] for s in range(self.stage + 1))
        return n_thoughts == self.own_thoughts

    def notes(self, graph: Graph | None) -> list[str]:
        """What a reader should know before believing the numbers."""
        method, found = self.config.method, []
        if method not in WITH_LATENTS:
            found.append(f"Trained by {method}: this model has no thoughts, it only prints.")
        elif method not in WITH_FEEDBACK:
            found.append(
                f"Trained by {method}: latents receive an embedding of their own. What is shown as"
                " a thought is the state before the latent, which is not fed back."
            )
        if self.rule is not None and self.rule.is_token:
            found.append(
                "Feedback rule token: every latent keeps an embedding of its own. What is shown as"
                " a thought is the state before the latent, which is not fed back."
            )
        elif self.rule is not None and not self.rule.is_last:
            found.append(
                f"Feedback rule {self.rule}: lengths and cosines are those of the vectors that are"
                " fed back; the output head reads the state that they are made from."
            )
        if self.has_labelled_thoughts:
            found.append(
                "Its thoughts were labelled in training with the concepts that so many hops lead"
                " to: if they look like a search, that is what it was taught, not what emerged."
            )
        if method in ("coconut_no_curriculum", "pause"):
            found.append(
                f"Trained by {method}: its last training asked for answers after all"
                f" {self.own_thoughts} thoughts. Answers after fewer, printed steps and facts are"
                " outside of it, unless an earlier phase taught them; the probability of the lead"
                " tells how far outside."
            )
        if self.n_thoughts > self.own_thoughts:
            found.append(f"Trained with {self.own_thoughts} thoughts; more are outside of it.")
        if graph is None and not knows_only_prosqa(self.tokenizer):
            found.append(f"Not a ProsQA question ({FORM}), so there is no graph to look for.")
        return found

    @property
    def _prints_steps(self) -> bool:
        """The method's stages train every number of thoughts, with the remaining steps behind."""
        return self.config.method in ("coconut", "pause_as_thought")

    def spell(self, token: int) -> str:
        """A token's text, control tokens and rows without a token included."""
        if token == self.tokenizer.eos_id:
            return END_OF_TEXT
        return self.tokenizer.decode([token], keep_markers=True) or f"<id {token}>"

    def _prompt(self, question: str, n_thoughts: int) -> Row:
        sample = Sample(0, self.tokenizer.encode_question(question + "\n"), [], [])
        markers = markers_of(self.tokenizer)
        return question_row(self.config, sample, self.stage, markers, n_thoughts)

    def _prompts(self, question: str) -> Batch:
        """The prompts with 0, 1, ... thoughts."""
        rows = [self._prompt(question, k) for k in range(self.n_thoughts + 1)]
        return collate(rows, self.tokenizer.pad_id)

    def _forced(
        self, question: str, graph: Graph, cases: Sequence[_Case]
    ) -> list[tuple[float, list[float]]]:
        """For k = 0, 1, ...: probability of the case's lead, and of each word given the lead."""
        # One word behind one lead may be cut into tokens in its own way: (k, tokens before the
        # word) is a prompt of its own. Usually there is one a k.
        spellings = [
            [_spelled(self.tokenizer, case, graph.nodes[node]) for node in case.nodes]
            for case in cases
        ]
        leads = [sorted({s.forced for s in row}) for row in spellings]
        plain = self._prompts(question)
        _, lead_logprobs = self.backend.continuation_logprobs(
            plain, [[lead for lead in row if lead] for row in leads]
        )
        prompts = [
            _behind(self._prompt(question, k), lead) for k, row in enumerate(leads) for lead in row
        ]
        if not prompts:
            return [(0.0, []) for _ in cases]
        words = [
            [s.tokens for s in spellings[k] if s.forced == lead]
            for k, row in enumerate(leads)
            for lead in row
        ]
        first, word_logprobs = self.backend.continuation_logprobs(
            collate(prompts, self.tokenizer.pad_id), words
        )
        found, at = [], 0
        for k, row in enumerate(leads):
            given = iter(lead_logprobs[k])
            log_leads = [float(next(given).sum(dtype=np.float64)) if lead else 0.0 for lead in row]
            largest = max(log_leads, default=0.0)
            total, joint = 0.0, {}
            for lead, log_lead in zip(row, log_leads, strict=True):
                weight = math.exp(log_lead - largest)
                same = [(i, s) for i, s in enumerate(spellings[k]) if s.forced == lead]
                total += weight * self._mass(first[at], same[0][1].shared, "")
                for (i, spelling), logprobs in zip(same, word_logprobs[at], strict=True):
                    if spelling.inside:
                        p = self._mass(first[at], spelling.shared, spelling.inside)
                    else:
                        p = _probability(logprobs)
                    joint[i] = weight * p
                at += 1
            values = [joint[i] / total if total else 0.0 for i in range(len(joint))]
            found.append((math.exp(largest) * total, values))
        return found

    def _mass(self, logprobs: np.ndarray, shared: str, inside: str) -> float:
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
        return [self.tokenizer.decode([i]) for i in range(self.tokenizer.vocab_size)]

    @cached_property
    def _beginning(self) -> dict[tuple[str, str], list[int]]:
        return {}

    def _segments(self, question: str, row: Row) -> tuple[list[str], list[int]]:
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
            end = len(self.tokenizer.decode(tokens[: i + 1]))
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

    def _answer_start(self, tokens: Sequence[int]) -> int:
        """Index of the first token behind the last answer sign; the tokens hold one."""
        signs = list(_ANSWER_SIGN.finditer(self.tokenizer.decode(tokens)))
        lengths = [len(self.tokenizer.decode(tokens[:i])) for i in range(len(tokens) + 1)]
        return next(i for i, length in enumerate(lengths) if length >= signs[-1].end())


@dataclass(frozen=True)
class _Case:
    """What is forced behind the thoughts: lead, then the word of one of the nodes, then tail."""

    lead: str
    nodes: list[int]
    tail: str


def _is_stated(line: str, stated: Collection[str]) -> bool | None:
    return None if line.lstrip().startswith("is ") else line.strip() in stated


def _case(kind: str, n_thoughts: int, graph: Graph) -> _Case:
    names, asked = graph.names, graph.nodes[graph.asked]
    concepts = [node for node in range(len(graph.nodes)) if node not in names]
    if kind == "step" and n_thoughts == 0:
        return _Case("", names, " is a {}.\n")
    return {
        "step": _Case("Every", concepts, " is a {}.\n"),
        "fact": _Case(f"{asked} is a", concepts, ".\n"),
        "answer": _Case(f"### {asked} is a", concepts, "."),
    }[kind]


@dataclass(frozen=True)
class _Spelling:
    """A word behind a lead, in tokens.

    forced: tokens that hold nothing of the word. tokens: those of the word. shared: what the first
    of them holds of the lead. inside: the rest of that token's text up to the word's end, if the
    word ends in it and it shares; else empty.
    """

    forced: tuple[int, ...]
    tokens: tuple[int, ...]
    shared: str
    inside: str


def _spelled(tokenizer: Tokenizer, case: _Case, word: str) -> _Spelling:
    """How a tokenizer writes a word behind a lead.

    GPT-2 writes `Every| le|mp|us| is|...`: the lead, then the word's own tokens, whose
    probabilities are multiplied. Our small encoding writes `Every lempus| is a ...`: the lead is
    inside the word's token, so its probability counts among all tokens that share that lead.
    """
    start = f"{case.lead} {word}" if case.lead else word
    ids = tokenizer.encode(start + case.tail.format(word))
    ends = [len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
    n_forced = sum(end <= len(case.lead) for end in ends)
    n_word = next(i for i, end in enumerate(ends) if end >= len(start)) + 1 - n_forced
    begins = ends[n_forced - 1] if n_forced else 0
    shared = case.lead[begins:]
    inside = start[len(case.lead) :] if shared and n_word == 1 else ""
    tokens = ids[n_forced : n_forced + n_word]
    return _Spelling(tuple(ids[:n_forced]), tuple(tokens), shared, inside)


def _behind(prompt: Row, tokens: Sequence[int]) -> Row:
    return Row(prompt.idx, [*prompt.ids, *tokens], None, prompt.first_latent, prompt.n_latents)


def _probability(logprobs: np.ndarray) -> float:
    return math.exp(float(logprobs.sum(dtype=np.float64)))
