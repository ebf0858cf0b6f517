"""The curriculum: epoch -> stage, and sample + stage -> row of tokens, for every method.

stage 0   question <start> <end> step1 step2 step3 ### answer
stage 1   question <start> L <end> step2 step3 ### answer
stage 2   question <start> L L <end> step3 ### answer
beyond M  question <start> L .. L <end> ### answer          (M = max_latent_stage)
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from coconut.config.keys import RunConfig
from coconut.config.methods import DATASET_METHODS, WITH_LATENTS
from coconut.errors import UserError
from coconut.text.tokenizer import Tokenizer

IGNORED = -100
"""Label of a position that no loss is taken at."""


MOST_LATENTS = 4096
"""In a row: more is a slip of the keyboard, and no machine's memory."""


@dataclass(frozen=True)
class Sample:
    """One tokenised item: question and steps with their newlines, answer with eos.

    latents: set if the item says its own number of latents; it then keeps all of its steps.
    thoughts: what each of those thoughts should name, a token each; empty: they are not labelled.
    """

    idx: int
    question: list[int]
    steps: list[list[int]]
    answer: list[int]
    latents: int | None = None
    thoughts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    """One sequence. labels is None for an evaluation question.

    first_latent: index of the first latent, -1 if there is none; latents stand in one run.
    """

    idx: int
    ids: list[int]
    labels: list[int] | None
    first_latent: int
    n_latents: int


@dataclass(frozen=True)
class Markers:
    """Ids of `<|start-latent|>`, `<|end-latent|>` and `<|latent|>`."""

    start: int
    end: int
    latent: int


def n_stages(config: RunConfig) -> int:
    """Number of the last stage that differs from the one before it."""
    if config.method not in ("coconut", "pause_as_thought", "no_thoughts"):
        return 0
    return config.max_latent_stage * _stages_per_step(config) + 1


def _stages_per_step(config: RunConfig) -> int:
    """Stages it takes to replace one step: c_thought of them if latents are added singly."""
    grows = config.latent_growth == "one" and config.method in ("coconut", "pause_as_thought")
    return config.c_thought if grows else 1


def stage_of_epoch(config: RunConfig, epoch: int) -> int:
    """Stage of an epoch, counted from 0. Methods without a schedule stay at one stage."""
    if config.method in ("cot", "no_cot", "icot", "recall", *DATASET_METHODS):
        return 0
    if config.method in ("pause", "coconut_no_curriculum"):
        return config.max_latent_stage + 1
    return epoch // config.epochs_per_stage


def plan(config: RunConfig, stage: int, n_steps: int) -> tuple[int, int]:
    """(steps to skip, latents to put in) of an item with n_steps steps at a stage.

    One rule for training and evaluation (the published code has two: with pad_latent_to_max False
    and fewer steps than stages it trains with more latents than it evaluates with).
    """
    c, m = config.c_thought, config.max_latent_stage
    if config.method in ("cot", "icot", "recall", *DATASET_METHODS):
        return 0, 0
    if config.method == "no_cot":
        return n_steps, 0
    if _stages_per_step(config) > 1:
        most = m * c if config.pad_latent_to_max else min(n_steps, m) * c
        skipped = n_steps if stage > m * c else min(-(-stage // c), n_steps)
        return skipped, min(stage, most)
    skipped = n_steps if stage > m else min(stage, n_steps)
    groups = min(stage, m) if config.pad_latent_to_max else min(stage, m, n_steps)
    return skipped, groups * c if config.method in WITH_LATENTS else 0


def draw_stage(config: RunConfig, stage: int, n_steps: int, rng: np.random.Generator) -> int:
    """The stage an item is trained at: the scheduled one, or a draw over earlier or all stages.

    uniform_prob: with this chance one that drops 0..n_steps steps (Coconut's released code).
    stage_mixing item: i <= stage with weight i + 1.
    """
    if config.uniform_prob > 0 and rng.random() < config.uniform_prob:
        return int(rng.integers(n_steps * _stages_per_step(config) + 1))
    if config.stage_mixing == "item":
        return mixed_stage(stage, rng)
    return stage


def mixed_stage(stage: int, rng: np.random.Generator) -> int:
    """Draw i in 0..stage with weight i + 1, so that earlier stages are not forgotten."""
    weights = np.arange(1, stage + 2)
    return int(rng.choice(stage + 1, p=weights / weights.sum()))


def training_row(
    config: RunConfig,
    sample: Sample,
    stage: int,
    markers: Markers | None,
    rng: np.random.Generator,
    progress: float = 0.0,
) -> Row:
    """The sequence and labels of one training item.

    progress: epochs done, with fraction (iCoT counts its removal by it). rng: the item's own.
    """
    if config.method == "recall":
        return _recall_row(sample, config.recall_sentences, rng)
    skipped, n_latents = plan(config, stage, len(sample.steps))
    if sample.latents is not None and config.method in WITH_LATENTS:
        skipped, n_latents = 0, sample.latents
    rest = [token for step in sample.steps[skipped:] for token in step]
    if config.method == "icot":
        rest = rest[_icot_removed(config, len(rest), progress, rng) :]
    targets = rest + sample.answer
    prompt = question_row(config, sample, stage, markers, n_latents)
    labels = [IGNORED] * len(prompt.ids)
    # A thought is the state before its latent, so the head reads it as a prediction of the latent.
    for i, token in enumerate(sample.thoughts[:n_latents], len(sample.question) + 1):
        labels[i] = token
    return replace(prompt, ids=prompt.ids + targets, labels=labels + targets)


def question_row(
    config: RunConfig,
    sample: Sample,
    stage: int,
    markers: Markers | None,
    n_latents: int | None = None,
) -> Row:
    """The prompt of one evaluation question. n_latents forces the number of latents."""
    if n_latents is None:
        _, n_latents = plan(config, stage, len(sample.steps))
    prompt = sample.question + _latent_run(config, n_latents, markers)
    first = len(sample.question) + 1 if n_latents else -1
    return Row(sample.idx, prompt, None, first, n_latents)


def evaluation_stage(config: RunConfig, made_with: Mapping[str, Any] | None) -> tuple[int, str]:
    """(stage, why) of a run that only evaluates.

    made_with: the checkpoint's coconut.json, None for a plain model.
    """
    if config.stage is not None:
        return config.stage, "key stage"
    if config.resume:
        why = f"resume: {config.resume} // {config.epochs_per_stage} epochs per stage"
        return stage_of_epoch(config, config.resume), why
    if made_with is not None and made_with.get("stage") is not None:
        return made_with["stage"], "the checkpoint's own"
    return stage_of_epoch(config, 0), "epoch 0"


def longest_row(config: RunConfig, sample: Sample, stages: Iterable[int]) -> int:
    """Tokens of the longest sequence that an item can become in training at any of the stages.

    Draws count too: uniform_prob may draw any stage up to the item's steps, mixing any earlier one.
    """
    if config.method == "recall":
        n = min(config.recall_sentences, len(sample.steps))
        return len(sample.question) + n * max(map(len, sample.steps))
    n, lengths = len(sample.steps), [len(step) for step in sample.steps]
    fixed = len(sample.question) + len(sample.answer)
    if config.method in WITH_LATENTS:
        fixed += 2
        if sample.latents is not None:
            return fixed + sample.latents + sum(lengths)
    drawn = set(stages)
    if config.stage_mixing != "none":
        drawn |= set(range(max(drawn)))
    if config.uniform_prob > 0:
        drawn |= set(range(n * _stages_per_step(config) + 1))
    plans = {plan(config, stage, n) for stage in drawn}
    return fixed + max(sum(lengths[skipped:]) + latents for skipped, latents in plans)


def remaining_steps(config: RunConfig, stage: int, n_steps: int) -> int:
    """Steps that the model is expected to print at a stage."""
    if config.method == "icot":
        return 0
    return n_steps - plan(config, stage, n_steps)[0]


def _latent_run(config: RunConfig, n_latents: int, markers: Markers | None) -> list[int]:
    if config.method not in WITH_LATENTS:
        return []
    assert markers is not None, "methods with latents have a tokenizer with markers"
    if n_latents > MOST_LATENTS:
        raise UserError(
            config.where,
            f"{n_latents:,} latents in a row (c_thought, max_latent_stage, n_latents), each a pass"
            f" of its own; at most {MOST_LATENTS:,}",
        )
    return [markers.start, *[markers.latent] * n_latents, markers.end]


def _icot_removed(
    config: RunConfig, n_tokens: int, progress: float, rng: np.random.Generator
) -> int:
    """Chain tokens removed from the left. Source: Deng et al. 2024 (arXiv 2405.14838), 3."""
    removed = int(config.icot_tokens_per_epoch * progress)
    if config.icot_smoothing > 0:
        # P(o) is proportional to exp(-rate * o): a geometric draw that starts at 0.
        removed += int(rng.geometric(-np.expm1(-config.icot_smoothing))) - 1
    if config.icot_remove_all_after is not None and removed >= config.icot_remove_all_after:
        return n_tokens
    return min(removed, n_tokens)


def _recall_row(sample: Sample, n_sentences: int, rng: np.random.Generator) -> Row:
    """Question, then randomly drawn sentences of it again; only their last tokens are labelled.

    Teaches the look-up that both chains and thoughts are made of. Its samples carry the question's
    sentences as `steps`. None comes twice: a repeat could be copied from the first time.
    """
    ids = list(sample.question)
    labels = [IGNORED] * len(ids)
    for choice in rng.permutation(len(sample.steps))[:n_sentences]:
        subject, targets = split_sentence(sample.steps[choice])
        ids += subject + targets
        labels += [IGNORED] * len(subject) + targets
    return Row(sample.idx, ids, labels, -1, 0)


def split_sentence(sentence: Sequence[int]) -> tuple[list[int], list[int]]:
    """Split a recalled sentence into what is given (its first token) and what is asked."""
    return list(sentence[:1]), list(sentence[1:])


def item_rng(seed: int, epoch: int, idx: int) -> np.random.Generator:
    """The random stream of one item in one epoch: the same in any process and after any resume."""
    return np.random.default_rng([seed, epoch, idx])


def markers_of(tokenizer: Tokenizer) -> Markers | None:
    """The three latent tokens, None if the tokenizer was not given them."""
    if tokenizer.start_id is None or tokenizer.end_id is None or tokenizer.latent_id is None:
        return None
    return Markers(tokenizer.start_id, tokenizer.end_id, tokenizer.latent_id)
