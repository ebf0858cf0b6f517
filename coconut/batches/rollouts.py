"""LaTRO's host side: where a rationale ends, the sequence it is scored in, rewards, advantages.

    x x x z z z | t t t | s y y y      x prompt, z rationale, t the stop that was said,
                                       s separator, y answer

One forward pass scores both branches behind z: neither sees the other. Sequences are lists; pads
exist only inside a batch, so nothing has to be moved to the front. Logarithms are natural, sums
run over tokens, nothing is divided by a length.
Source: arXiv 2411.04282; where its released code differs, the preset `released` follows the code.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from coconut.batches.batch import TARGET_MULTIPLE, Batch, collate, round_up
from coconut.batches.curriculum import Row
from coconut.batches.surrogate import Surrogate


@dataclass(frozen=True)
class Cut:
    """A rationale is the first n_kept tokens; the stop was complete after n_spoken of them.

    Unfinished: both are all of the tokens.
    """

    n_kept: int
    n_spoken: int
    is_finished: bool


@dataclass(frozen=True)
class Stops:
    """What ends a rationale.

    ids: single tokens. strings: found in the decoded text, however it was tokenised. sequences:
    found as exactly these tokens (the released code's way with the strings). decode: text of
    tokens, without control tokens.
    """

    ids: frozenset[int]
    decode: Callable[[Sequence[int]], str]
    strings: tuple[str, ...] = ()
    sequences: tuple[tuple[int, ...], ...] = ()

    def ended(self, tokens: Sequence[int]) -> bool:
        """Whether the last token completes a stop."""
        if tokens[-1] in self.ids or any(tuple(tokens[-len(s) :]) == s for s in self.sequences):
            return True
        if not self.strings:
            return False
        # A token has at least a byte; some more, since a tokenizer may drop an outer space.
        longest = max(len(s.encode()) for s in self.strings) + 4
        text = self.decode(tokens[-longest:])
        return any(s in text for s in self.strings)

    def cut(self, tokens: Sequence[int]) -> Cut:
        """Where the rationale ends: before the first stop of any kind.

        A token that is partly of a stop string is not kept.
        """
        n = len(tokens)
        found = [(i, i + 1) for i, token in enumerate(tokens) if token in self.ids][:1]
        for s in self.sequences:
            starts = (i for i in range(n - len(s) + 1) if tuple(tokens[i : i + len(s)]) == s)
            found += [(i, i + len(s)) for i in starts][:1]
        if self.strings:
            text = self.decode(tokens)
            starts_ends = [(text.find(s), text.find(s) + len(s)) for s in self.strings if s in text]
            if starts_ends:
                start, end = min(starts_ends)
                found.append((self._whole_tokens(tokens, start), self._until(tokens, end)))
        if not found:
            return Cut(n, n, False)
        n_kept, n_spoken = min(found)
        return Cut(n_kept, n_spoken, True)

    def _whole_tokens(self, tokens: Sequence[int], length: int) -> int:
        """Most tokens whose text has at most this many characters."""
        counts = range(1, len(tokens) + 1)
        return bisect_right(counts, length, key=lambda n: len(self.decode(tokens[:n])))

    def _until(self, tokens: Sequence[int], length: int) -> int:
        """Fewest tokens whose text has at least this many characters."""
        n = self._whole_tokens(tokens, length - 1) + 1
        return min(n, len(tokens))


def strip_end(
    tokens: Sequence[int],
    decode: Callable[[Sequence[int]], str],
    encode: Callable[[str], list[int]],
) -> tuple[int, list[int]]:
    """(n, rest): tokens[:n] + rest is the text without its trailing white space.

    Whole tokens of white space fall away; of one that only ends in it the remaining text is
    encoded anew, so that everything before keeps its tokens.
    """
    n = len(tokens)
    while n:
        last = decode(tokens[:n])[len(decode(tokens[: n - 1])) :]
        if last and last.rstrip() == last:
            return n, []
        if last.strip():
            return n - 1, encode(last.rstrip())
        n -= 1
    return 0, []


@dataclass(frozen=True)
class Rollout:
    """One rationale between its prompt and its answer, as it is scored.

    prompt x, its n_latents latents standing first_latent tokens in (-1: none). shared: tokens of
    the rationale that both branches begin with. tail: what else the policy is held to (the stop).
    bridge: what stands before the answer instead (the separator). answer y.
    n_said: tokens of the rationale, len(shared) but for one cut within white space.
    """

    prompt: list[int]
    shared: list[int]
    tail: list[int]
    bridge: list[int]
    answer: list[int]
    n_said: int
    is_finished: bool
    first_latent: int = -1
    n_latents: int = 0

    @property
    def said(self) -> list[int]:
        """The tokens whose log-probability is the policy's."""
        return self.shared + self.tail


def make_rollout(
    prompt: Row,
    tokens: Sequence[int],
    answer: Sequence[int],
    stops: Stops,
    separator: str,
    encode: Callable[[str], list[int]],
    include_stop: bool,
) -> Rollout:
    """Cut a sampled rationale and place its answer.

    separator: stands between rationale and answer in place of the rationale's trailing white
    space; empty: the answer follows directly. include_stop: the policy's log-probability covers
    the stop as well, so that the decision to end is learned.
    """
    cut = stops.cut(tokens)
    kept = list(tokens[: cut.n_kept])
    n_shared = len(kept)
    rest: list[int] = []
    if separator:
        n_shared, rest = strip_end(kept, stops.decode, encode)
    n_held = cut.n_spoken if include_stop else cut.n_kept
    return Rollout(
        prompt=prompt.ids,
        shared=kept[:n_shared],
        tail=list(tokens[n_shared:n_held]),
        bridge=[*rest, *(encode(separator) if separator else [])],
        answer=list(answer),
        n_said=cut.n_kept,
        is_finished=cut.is_finished,
        first_latent=prompt.first_latent,
        n_latents=prompt.n_latents,
    )


def exchanged(own: Sequence[Rollout], separator: Sequence[int]) -> dict[str, list[Rollout]]:
    """The answers behind their own rationale, the next question's (shuffled) and none (empty)."""
    shuffled = [
        replace(r, shared=o.shared, bridge=o.bridge, tail=[])
        for r, o in zip(own, [*own[1:], *own[:1]], strict=True)
    ]
    empty = [replace(r, shared=[], bridge=list(separator), tail=[]) for r in own]
    return {"own": list(own), "shuffled": shuffled, "empty": empty}


@dataclass(frozen=True, kw_only=True)
class RolloutBatch(Batch):
    """Rollouts as a batch. Of each target: its row, whether it is of the answer, and (in
    target_weight) what its nats are multiplied with in the loss.

    temperature (N,) float32: what its logits are divided by; None if by 1 everywhere.
    n_real: targets before the padding of the list. surrogate: further terms of the loss.
    """

    target_row: np.ndarray
    target_is_answer: np.ndarray
    temperature: np.ndarray | None
    n_real: int
    surrogate: Surrogate | None = None

    @property
    def is_said(self) -> np.ndarray:
        """(N,) bool: which targets are of rationales."""
        return ~self.target_is_answer & (np.arange(len(self.target_row)) < self.n_real)

    def said(self, values: np.ndarray) -> list[list[float]]:
        """Values (N,) of the targets: for each row those of its rationale."""
        is_said = self.is_said[: self.n_real]
        lengths = np.bincount(self.target_row[: self.n_real][is_said], minlength=len(self.ids))
        parts = np.split(values[: self.n_real][is_said], np.cumsum(lengths)[:-1])
        return [part.tolist() for part in parts]

    def sums(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(rationale (B,), answer (B,)): values (N,) of the targets, added up by row."""
        values = np.asarray(values[: self.n_real], np.float64)
        rows, n = self.target_row[: self.n_real], len(self.ids)
        answer = self.target_is_answer[: self.n_real]
        return (
            np.bincount(rows[~answer], values[~answer], n),
            np.bincount(rows[answer], values[answer], n),
        )


def collate_rollouts(
    rollouts: Sequence[Rollout],
    pad_id: int,
    pad_multiple: int = 1,
    reward_offset: int = 0,
    temperature: float = 1.0,
    advantages: Sequence[float] | None = None,
    answer_weight: float | np.ndarray = 1.0,
    n_rows: int = 1,
) -> RolloutBatch:
    """Rows [prompt shared tail bridge answer], with one target a scored token.

    reward_offset: -1 begins the answer's span a token early, as the released reward does.
    temperature: of the rationale; the answer is always scored at 1.
    advantages: for the loss -1/n_rows sum(A log p(said) + answer_weight log p(answer)); without
    them every target weighs 1. answer_weight: of all rows, or (B,). If no answer weighs anything
    they are left out of the rows.
    """
    answer_weights = np.broadcast_to(answer_weight, len(rollouts))
    with_answer = advantages is None or answer_weights.any()
    branches = [r.bridge + r.answer if with_answer else [] for r in rollouts]
    rows = [
        Row(i, r.prompt + r.said + branch, None, r.first_latent, r.n_latents)
        for i, (r, branch) in enumerate(zip(rollouts, branches, strict=True))
    ]
    batch = collate(rows, pad_id, pad_multiple)
    width = batch.ids.shape[1]
    segments, positions = np.zeros(batch.ids.shape, np.int32), batch.positions.copy()
    targets: list[tuple[float, ...]] = []
    for i, (r, branch) in enumerate(zip(rollouts, branches, strict=True)):
        begin = int(np.argmax(batch.mask[i]))
        split = begin + len(r.prompt) + len(r.shared)
        second = split + len(r.tail)
        if r.tail and branch:
            segments[i, split:second] = 1
            segments[i, second : second + len(branch)] = 2
            positions[i, second : second + len(branch)] -= len(r.tail)
        first = begin + len(r.prompt)
        spans = [(column - 1, column, False) for column in range(first, second)]
        if branch:
            from_, to = second + len(r.bridge), second + len(branch)
            columns = [*range(from_, to)]
            if reward_offset:
                # Nothing stands before the first token of all, so nothing can score it.
                early = [*range(begin + 1, split), *range(second, from_)]
                columns = [*early[reward_offset:], *columns]
            for column in columns:
                # The branch follows the shared tokens, wherever its first column stands.
                before = split - 1 if column == second else column - 1
                spans.append((before, column, True))
        for before, column, answers in spans:
            weight = 1.0
            if advantages is not None:
                weight = float(answer_weights[i] if answers else advantages[i]) / n_rows
            targets.append((i * width + before, batch.ids[i, column], i, answers, weight))
    multiple = TARGET_MULTIPLE if pad_multiple > 1 else 1
    # Exact: every number but the weight is whole and below 2**53.
    table = np.zeros((max(round_up(len(targets), multiple), 1), 5))
    table[: len(targets)] = np.reshape(targets, (-1, 5))
    index, ids, of_row = np.ascontiguousarray(table[:, :3].T, np.int32)
    is_answer = table[:, 3] != 0
    fields = vars(batch) | {
        "segments": segments if segments.any() else None,
        "positions": positions,
        "target_index": index,
        "target_ids": ids,
        "target_weight": table[:, 4].astype(np.float32),
    }
    tempered = np.where(is_answer, 1.0, temperature).astype(np.float32)
    return RolloutBatch(
        **fields,
        target_row=of_row,
        target_is_answer=is_answer,
        temperature=None if temperature == 1 else tempered,
        n_real=len(targets),
    )
