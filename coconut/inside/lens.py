"""What a checkpoint thinks, thought by thought.

Everything here is read from one prompt with 0, 1, ... thoughts:

    question <start> L1 .. Lk <end>            what would the model say if it stopped here?
    question <start> L1 .. Lk <end> LEAD       and which concept, were it to begin with LEAD?
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from coconut.backend import Backend, MakeBackend, Trace
from coconut.batches.batch import collate
from coconut.batches.curriculum import Row, Sample, markers_of, plan, question_row
from coconut.batches.decoding import Decoding
from coconut.checkpoints.named import checkpoint_config, found_model
from coconut.checkpoints.source import open_source
from coconut.config.methods import WITH_FEEDBACK, WITH_LATENTS
from coconut.errors import UserError
from coconut.inside.findings import READINGS, Inspection, Reading, Stop, Thought, segments_of
from coconut.inside.forced import Case, Forcing, case_of, probability, spelled
from coconut.inside.graph import Graph, read_graph, sentences
from coconut.inside.known import FORM, knows_only_prosqa, warnings
from coconut.text.answers import exact_match, extract
from coconut.text.tokenizer import END_OF_TEXT, Tokenizer

_ANSWER_SIGN = re.compile("#{3,}")


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
        self.own_thoughts = plan(self.config, self.stage, self.config.max_latent_stage)[1]
        self._think(n_thoughts)
        self.rule = None if opened.source.feedback is None else opened.source.feedback.rule
        self.has_labelled_thoughts: bool = made_with.get("labelled_thoughts", False)
        self.backend: Backend = make_backend(self.config, opened.source)
        self._forcing = Forcing(self.tokenizer, self.backend)

    def _think(self, n_thoughts: int | None) -> None:
        if n_thoughts is not None and n_thoughts < 0:
            raise UserError(str(self.directory), f"latents must be at least 0, got {n_thoughts}")
        if n_thoughts and self.config.method not in WITH_LATENTS:
            raise UserError(
                str(self.directory),
                f"was trained by {self.config.method}, which has no thoughts; leave --latents out",
            )
        self.given_thoughts = n_thoughts
        self.n_thoughts = self.own_thoughts if n_thoughts is None else n_thoughts
        by_method = "thought" if self.n_thoughts else "fact"
        self.own_reading = "step" if self._prints_steps else by_method

    def with_thoughts(self, n_thoughts: int | None) -> Lens:
        """The same opened checkpoint with so many thoughts; None: as it was opened.

        Raises UserError for a number that its method cannot have.
        """
        if n_thoughts is None:
            return self
        other = copy.copy(self)
        other._think(n_thoughts)
        return other

    @property
    def about(self) -> str:
        """Which checkpoint, in which twin, by which method, with how many thoughts."""
        parts = (self.directory, self.backend.name, self.config.method)
        return " | ".join([*map(str, parts), f"{self.n_thoughts} thoughts"])

    def __repr__(self) -> str:
        return f"<{self.about}>"

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
        if gold is None and graph is not None:
            gold = graph.answer
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
        n = len(self.prompt(question, self.n_thoughts).ids)
        limit = self.backend.n_positions
        behind = [(max_new_tokens, "new ones", " or lower --max-new-tokens")]
        if graph is not None:
            behind.append((self._n_forced(graph), "that are forced behind them", ""))
        # The prompts of fewer thoughts are no longer than this.
        for more, which, remedy in behind:
            if limit is not None and n + more > limit:
                raise UserError(
                    "question",
                    f"{n} tokens with its thoughts and {more} {which}, but the model has {limit}"
                    f" positions; shorten it{remedy}",
                )

    def room(self, question: str, max_new_tokens: int) -> int:
        """New tokens, at most so many, that the model has positions for behind all thoughts."""
        if self.backend.n_positions is None:
            return max_new_tokens
        longest = len(self.prompt(question, self.n_thoughts).ids)
        return min(max_new_tokens, self.backend.n_positions - longest)

    def _n_forced(self, graph: Graph) -> int:
        """Tokens of the longest text that any reading or choice forces behind the thoughts."""
        texts = [f"### {graph.statement(node)}" for node in range(len(graph.nodes))]
        texts += [f"Every {word} is a {word}." for word in graph.nodes]
        return max(len(self.tokenizer.encode(text)) for text in texts)

    def trace(self, question: str) -> Trace | None:
        """What happens at the latents of the question's prompt, as arrays; None without any."""
        row = self.prompt(question, self.n_thoughts)
        if not row.n_latents:
            return None
        return self.backend.trace(collate([row], self.tokenizer.pad_id))

    def thoughts(self, question: str, n_top: int = 10) -> tuple[list[str], list[Thought]]:
        """(segments of the prompt, every thought of it)."""
        row = self.prompt(question, self.n_thoughts)
        segments, of_token = segments_of(self.tokenizer, question, row)
        trace = self.trace(question)
        if trace is None:
            return segments, []
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
        batch = collate(self._prompts(question), tokenizer.pad_id)
        decoding = Decoding(max_new_tokens, tokenizer.eos_id, stops=tokenizer.ended)
        written = self.backend.generate(batch, decoding)
        stated = set(sentences(question))
        forced = []
        if graph is not None:
            forced = [tokenizer.encode(f"### {graph.statement(c)}") for c in graph.choices]
        _, logprobs = self.backend.continuation_logprobs(batch, [[new, *forced] for new in written])
        found = []
        for k, (new, (own, *others)) in enumerate(zip(written, logprobs, strict=True)):
            text = tokenizer.decode(new)
            answer, chain = extract(text)
            lines = [line for line in chain.split("\n") if line.strip()]
            start = self._answer_start(new) if answer else 0
            is_finished = tokenizer.ended(new)
            found.append(
                Stop(
                    n_thoughts=k,
                    text=text,
                    chain=lines,
                    chain_is_stated=[_is_stated(line, stated) for line in lines],
                    answer=answer,
                    certainty=probability(own[start:]) if answer else None,
                    is_finished=is_finished,
                    is_correct=None if gold is None else exact_match(answer, gold),
                    choices=(probability(others[0]), probability(others[1])) if others else None,
                    is_trained=self.is_trained(k),
                )
            )
        return found

    def reading(self, question: str, graph: Graph, kind: str) -> Reading:
        """The latent tree by one kind of lead (see READINGS), for every number of thoughts."""
        if kind == "thought":
            values = self._named(question, graph)
            return Reading(kind, [""] * len(values), [sum(row) for row in values], values, True)
        cases = [case_of(kind, k, graph) for k in range(self.n_thoughts + 1)]
        found = self._forcing.probabilities(self._prompts(question), graph, cases)
        values = [[0.0] * len(graph.nodes) for _ in cases]
        for row, case, (_, probabilities) in zip(values, cases, found, strict=True):
            for node, p in zip(case.nodes, probabilities, strict=True):
                row[node] = p
        is_trained = {"step": self._prints_steps, "fact": False, "answer": True}[kind]
        return Reading(
            kind, [case.lead for case in cases], [p for p, _ in found], values, is_trained
        )

    def _named(self, question: str, graph: Graph) -> list[list[float]]:
        """For k = 0, 1, ...: the probability of each concept in thought k; zeros for k = 0."""
        found = [[0.0] * len(graph.nodes)]
        trace = self.trace(question)
        if trace is None:
            return found
        case = Case(" is a", [n for n in range(len(graph.nodes)) if n not in graph.names], ".")
        words = [(n, spelled(self.tokenizer, case, graph.nodes[n])) for n in case.nodes]
        for logprobs in trace.logprobs:
            values = [0.0] * len(graph.nodes)
            for node, word in words:
                if word.inside:
                    values[node] = self._forcing.mass(logprobs, word.shared, word.inside)
                else:
                    values[node] = math.exp(logprobs[word.tokens[0]])
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

    def prompt(self, question: str, n_thoughts: int | None) -> Row:
        """A question with so many thoughts behind it, None for the stage's, as the method asks."""
        sample = Sample(0, self.tokenizer.encode_question(question + "\n"), [], [])
        markers = markers_of(self.tokenizer)
        return question_row(self.config, sample, self.stage, markers, n_thoughts)

    def _prompts(self, question: str) -> list[Row]:
        """The prompts with 0, 1, ... thoughts."""
        return [self.prompt(question, k) for k in range(self.n_thoughts + 1)]

    def _answer_start(self, tokens: Sequence[int]) -> int:
        """Index of the first token behind the last answer sign; the tokens hold one."""
        signs = list(_ANSWER_SIGN.finditer(self.tokenizer.decode(tokens)))
        lengths = [len(self.tokenizer.decode(tokens[:i])) for i in range(len(tokens) + 1)]
        return next(i for i, length in enumerate(lengths) if length >= signs[-1].end())


def _is_stated(line: str, stated: Collection[str]) -> bool | None:
    return None if line.lstrip().startswith("is ") else line.strip() in stated
