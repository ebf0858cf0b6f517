"""Stages, rows and draws, against the reference's rows and by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from golden_models import TOKENS, golden

from coconut.batches.curriculum import (
    IGNORED,
    Markers,
    Row,
    Sample,
    draw_stage,
    evaluation_stage,
    item_rng,
    longest_row,
    mixed_stage,
    n_stages,
    plan,
    question_row,
    remaining_steps,
    split_sentence,
    stage_of_epoch,
    training_row,
)
from coconut.config.keys import RunConfig

MARKERS = Markers(TOKENS["start"], TOKENS["end"], TOKENS["latent"])
S, E, L = TOKENS["start"], TOKENS["end"], TOKENS["latent"]
SAMPLES = [
    Sample(s["idx"], s["question_tokenized"], s["steps_tokenized"], s["answer_tokenized"])
    for s in golden("cases")["samples"]
]
ITEM = Sample(7, [1, 2, 3], [[11, 12], [21], [31, 32, 33]], [91, 92])
"""Three steps of two, one and three tokens."""


def config(method: str = "coconut", **keys) -> RunConfig:
    return RunConfig(method=method, **keys)


def row(sample: Sample, stage: int, progress: float = 0.0, **keys) -> Row:
    return training_row(config(**keys), sample, stage, MARKERS, item_rng(0, 0, 0), progress)


def call_config(call: dict) -> RunConfig:
    names = ("method", "pad_latent_to_max", "c_thought", "max_latent_stage")
    return RunConfig(**{name: call[name] for name in names})


# ---- the reference's rows


def is_o8(call: dict, sample: Sample) -> bool:
    """Declared difference O8: without padding the reference trains a short item with more latents
    than it evaluates it with; here one rule holds for both."""
    return (
        call["method"] == "coconut"
        and not call["pad_latent_to_max"]
        and len(sample.steps) < call["stage"] <= call["max_latent_stage"]
    )


def test_training_rows_equal_the_reference() -> None:
    n_same, n_o8 = 0, 0
    for call in golden("staging")["calls"]:
        for sample, number in zip(SAMPLES, call["train_rows"], strict=True):
            theirs = golden("staging")["rows"][number]
            ours = training_row(
                call_config(call), sample, call["stage"], MARKERS, item_rng(0, 0, 0)
            )
            if is_o8(call, sample):
                n_o8 += 1
                n = len(sample.steps) * call["c_thought"]
                thoughts = [S, *[L] * n, E]
                assert ours.ids == sample.question + thoughts + sample.answer
                assert theirs["input_ids"].count(L) == call["stage"] * call["c_thought"] > n
                continue
            n_same += 1
            assert ours.ids == theirs["input_ids"]
            assert ours.labels == theirs["labels"]
            assert ours.idx == theirs["idx"]
            assert len(ours.ids) == len(theirs["attention_mask"]) == sum(theirs["attention_mask"])
            assert theirs["position_ids"] == list(range(len(ours.ids)))
            assert (ours.n_latents, ours.first_latent) == latents_of(ours.ids)
    assert (n_same, n_o8) == (468, 12)


def test_evaluation_questions_equal_the_reference() -> None:
    for call in golden("staging")["calls"]:
        for sample, number in zip(SAMPLES, call["question_rows"], strict=True):
            theirs = golden("staging")["rows"][number]
            ours = question_row(call_config(call), sample, call["stage"], MARKERS)
            assert ours.ids == theirs["input_ids"] and ours.idx == theirs["idx"]
            assert ours.labels is None
            assert (ours.n_latents, ours.first_latent) == latents_of(ours.ids)


def latents_of(ids: list[int]) -> tuple[int, int]:
    return ids.count(L), ids.index(L) if L in ids else -1


def test_training_and_evaluation_use_one_number_of_latents() -> None:
    for call in golden("staging")["calls"]:
        for sample in SAMPLES:
            trained = training_row(
                call_config(call), sample, call["stage"], MARKERS, item_rng(0, 0, 0)
            )
            asked = question_row(call_config(call), sample, call["stage"], MARKERS)
            assert trained.ids[: len(asked.ids)] == asked.ids


# ---- the worked schedules of the specification


def test_the_gsm8k_schedule_ends_with_all_steps_removed() -> None:
    gsm = config(c_thought=2, epochs_per_stage=3, max_latent_stage=3, resume=3, num_epochs=25)
    plans = [plan(gsm, stage_of_epoch(gsm, epoch), 5) for epoch in range(3, 25)]
    assert plans == [(1, 2)] * 3 + [(2, 4)] * 3 + [(3, 6)] * 3 + [(5, 6)] * 13


def test_the_prosqa_schedule_reaches_its_last_stage_at_epoch_35() -> None:
    prosqa = config(c_thought=1, epochs_per_stage=5, max_latent_stage=6, num_epochs=50)
    plans = [plan(prosqa, stage_of_epoch(prosqa, epoch), 8) for epoch in range(50)]
    stages = [pair for s in range(7) for pair in [(s, s)] * 5]
    assert plans == stages + [(8, 6)] * 15
    assert n_stages(prosqa) == 7


def test_a_stage_beyond_the_last_changes_nothing() -> None:
    for method in ("coconut", "no_thoughts", "pause_as_thought"):
        for growth in ("stage", "one"):
            run = config(method, c_thought=2, max_latent_stage=3, latent_growth=growth)
            last = n_stages(run)
            for n in range(6):
                assert plan(run, last, n) == plan(run, last + 1, n) == plan(run, 99, n)
            assert plan(run, last - 1, 9) != plan(run, last, 9)


@pytest.mark.parametrize("method", ["cot", "no_cot", "icot", "recall"])
def test_methods_without_stages_stay_at_stage_0(method: str) -> None:
    assert {stage_of_epoch(config(method, epochs_per_stage=1), e) for e in range(9)} == {0}


# ---- methods, by hand


@pytest.mark.parametrize(
    "stage, ids",
    [
        (0, [1, 2, 3, S, E, 11, 12, 21, 31, 32, 33, 91, 92]),
        (1, [1, 2, 3, S, L, L, E, 21, 31, 32, 33, 91, 92]),
        (2, [1, 2, 3, S, L, L, L, L, E, 31, 32, 33, 91, 92]),
        (3, [1, 2, 3, S, L, L, L, L, E, 91, 92]),
    ],
)
@pytest.mark.parametrize("method", ["coconut", "pause_as_thought"])
def test_latents_take_the_place_of_steps(method: str, stage: int, ids: list[int]) -> None:
    made = row(ITEM, stage, method=method, c_thought=2, max_latent_stage=2)
    assert made.ids == ids
    n_prompt = ids.index(E) + 1
    assert made.labels == [IGNORED] * n_prompt + ids[n_prompt:]
    assert (made.idx, made.n_latents, made.first_latent) == (7, ids.count(L), 4 if stage else -1)


@pytest.mark.parametrize("method", ["pause", "coconut_no_curriculum"])
def test_methods_without_curriculum_stand_at_the_last_stage_from_the_start(method: str) -> None:
    run = config(method, c_thought=2, max_latent_stage=2, epochs_per_stage=1)
    for epoch in (0, 5):
        made = training_row(run, ITEM, stage_of_epoch(run, epoch), MARKERS, item_rng(0, 0, 0))
        assert made.ids == [1, 2, 3, S, L, L, L, L, E, 91, 92]


def test_methods_without_latents_have_no_markers() -> None:
    assert row(ITEM, 2, method="cot").ids == [1, 2, 3, 11, 12, 21, 31, 32, 33, 91, 92]
    assert row(ITEM, 2, method="no_cot").ids == [1, 2, 3, 91, 92]
    assert row(ITEM, 2, method="no_thoughts").ids == [1, 2, 3, 31, 32, 33, 91, 92]
    assert question_row(config("no_thoughts"), ITEM, 2, None).ids == [1, 2, 3]


def test_no_cot_skips_more_than_a_hundred_steps() -> None:
    long = Sample(0, [1], [[5]] * 150, [9])
    assert row(long, 0, method="no_cot").ids == [1, 9]


def test_an_item_without_steps_works_at_every_stage() -> None:
    bare = Sample(0, [1], [], [9])
    assert row(bare, 0).ids == [1, S, E, 9]
    assert row(bare, 2, pad_latent_to_max=False).ids == [1, S, E, 9]
    assert row(bare, 2, pad_latent_to_max=True).ids == [1, S, L, L, E, 9]


def test_a_forced_number_of_latents_overrides_the_stage() -> None:
    run = config(c_thought=2, max_latent_stage=3)
    assert question_row(run, ITEM, 2, MARKERS, 5).ids == [1, 2, 3, S, *[L] * 5, E]
    assert question_row(run, ITEM, 2, MARKERS, 0).first_latent == -1


def test_a_thought_is_labelled_at_the_latent_it_becomes() -> None:
    told = Sample(7, [1, 2, 3], [], [91, 92], latents=2, thoughts=(51, 52))
    made = row(told, 3)
    assert made.ids == [1, 2, 3, S, L, L, E, 91, 92]
    assert made.labels == [IGNORED] * 4 + [51, 52, IGNORED, 91, 92]
    assert row(told, 3, method="cot").labels == [IGNORED] * 3 + [91, 92]


def test_making_rows_leaves_the_sample_alone() -> None:
    before = repr(ITEM)
    for method in ("coconut", "cot", "icot", "recall"):
        row(ITEM, 2, 1.0, method=method)
    assert repr(ITEM) == before


# ---- growth by one latent


def test_growth_by_one_adds_a_latent_a_stage_and_drops_a_step_with_the_first_of_each() -> None:
    run = config(c_thought=2, max_latent_stage=2, latent_growth="one")
    plans = [plan(run, stage, 3) for stage in range(6)]
    assert plans == [(0, 0), (1, 1), (1, 2), (2, 3), (2, 4), (3, 4)]
    assert n_stages(run) == 5


def test_growth_by_one_without_padding_stops_at_the_items_steps() -> None:
    run = config(c_thought=2, max_latent_stage=3, latent_growth="one", pad_latent_to_max=False)
    assert [plan(run, stage, 1) for stage in range(8)] == [(0, 0), (1, 1)] + [(1, 2)] * 6


def test_growth_by_one_equals_growth_by_stage_with_one_latent_a_step() -> None:
    for stage in range(6):
        for n in range(5):
            both = [
                plan(config(max_latent_stage=3, latent_growth=growth), stage, n)
                for growth in ("stage", "one")
            ]
            assert both[0] == both[1]


# ---- draws


def test_uniform_rows_are_those_of_the_drawn_stage() -> None:
    # Our draws come from (seed, epoch, index), the reference's from Python's generator: the rows of
    # a drawn stage are compared, and that every stage of 0..n occurs there.
    for case in golden("staging")["uniform"]:
        for sample, number in zip(SAMPLES, case["train_rows"], strict=True):
            theirs = golden("staging")["rows"][number]["input_ids"]
            run = call_config(case)
            reachable = {
                tuple(training_row(run, sample, s, MARKERS, item_rng(0, 0, 0)).ids)
                for s in {*range(len(sample.steps) + 1), case["stage"]}
            }
            assert tuple(theirs) in reachable


def test_uniform_prob_redraws_over_all_steps_of_the_item() -> None:
    run = config(uniform_prob=0.3, max_latent_stage=3)
    drawn = Counter(draw_stage(run, 1, 3, item_rng(0, 0, i)) for i in range(20_000))
    share = {stage: count / 20_000 for stage, count in drawn.items()}
    # 0.3 spread over 0..3, the other 0.7 stay at stage 1.
    assert share == pytest.approx({0: 0.075, 1: 0.775, 2: 0.075, 3: 0.075}, abs=0.01)


def test_uniform_prob_covers_every_number_of_dropped_steps_with_growth_by_one() -> None:
    run = config(uniform_prob=1.0, c_thought=2, max_latent_stage=3, latent_growth="one")
    drawn = {draw_stage(run, 0, 3, item_rng(0, 0, i)) for i in range(200)}
    assert drawn == set(range(7))


def test_mixing_draws_earlier_stages_with_weight_i_plus_1() -> None:
    rng = np.random.default_rng(0)
    drawn = Counter(mixed_stage(3, rng) for _ in range(20_000))
    share = [drawn[i] / 20_000 for i in range(4)]
    assert share == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.01)
    run = config(stage_mixing="item")
    assert {draw_stage(run, 2, 5, item_rng(0, 0, i)) for i in range(100)} == {0, 1, 2}
    assert mixed_stage(0, rng) == 0


def test_without_draws_the_scheduled_stage_is_kept() -> None:
    for mixing in ("none", "batch"):
        assert draw_stage(config(stage_mixing=mixing), 2, 5, item_rng(0, 0, 0)) == 2


def test_the_draw_of_an_item_depends_on_seed_epoch_and_index_alone() -> None:
    def number(*key: int) -> int:
        return int(item_rng(*key).integers(2**60))

    assert number(1, 2, 3) == number(1, 2, 3)
    assert len({number(1, 2, 3), number(2, 2, 3), number(1, 3, 3), number(1, 2, 4)}) == 4


# ---- iCoT


def test_icot_removes_tokens_of_the_chain_from_the_left_as_epochs_go_by() -> None:
    keys = dict(method="icot", icot_tokens_per_epoch=2, icot_smoothing=0)
    chain = [11, 12, 21, 31, 32, 33]
    for progress, removed in ((0, 0), (0.49, 0), (0.5, 1), (1, 2), (2.5, 5), (3, 6), (99, 6)):
        made = row(ITEM, 0, progress, **keys)
        assert made.ids == [1, 2, 3, *chain[removed:], 91, 92]
        assert made.labels == [IGNORED] * 3 + [*chain[removed:], 91, 92]
    assert remaining_steps(config("icot"), 0, 3) == 0


def test_icot_may_remove_the_whole_chain_at_once_from_a_point_on() -> None:
    keys = dict(method="icot", icot_tokens_per_epoch=2, icot_smoothing=0, icot_remove_all_after=4)
    assert row(ITEM, 0, 1.5, **keys).ids == [1, 2, 3, 31, 32, 33, 91, 92]
    assert row(ITEM, 0, 2.0, **keys).ids == [1, 2, 3, 91, 92]


@pytest.mark.slow
def test_icot_smoothing_falls_exponentially() -> None:
    run = config("icot", icot_tokens_per_epoch=0, icot_smoothing=0.7)
    long = Sample(0, [1], [list(range(100, 160))], [9])
    counts = Counter(
        62 - len(training_row(run, long, 0, None, item_rng(0, 0, i)).ids) for i in range(20_000)
    )
    share = [counts[o] / 20_000 for o in range(5)]
    q = np.exp(-0.7)
    assert share == pytest.approx([(1 - q) * q**o for o in range(5)], abs=0.012)


@pytest.mark.parametrize("rate", [1e-300, 1e-12, 1e6])
def test_icot_smoothing_may_take_any_rate(rate: float) -> None:
    made = row(ITEM, 0, method="icot", icot_tokens_per_epoch=0, icot_smoothing=rate)
    assert len(made.ids) == (5 if rate < 1 else 11)


# ---- recall


def test_recall_asks_for_the_rest_of_drawn_sentences() -> None:
    made = row(ITEM, 0, method="recall", recall_sentences=40)
    assert made.ids[:3] == ITEM.question and made.labels[:3] == [IGNORED] * 3
    rest, labels, seen = made.ids[3:], made.labels[3:], []
    while rest:
        sentence = next(s for s in ITEM.steps if rest[: len(s)] == s)
        assert labels[: len(sentence)] == [IGNORED, *sentence[1:]]
        rest, labels = rest[len(sentence) :], labels[len(sentence) :]
        seen.append(sentence[0])
    assert sorted(seen) == [11, 21, 31]
    fewer = row(ITEM, 0, method="recall", recall_sentences=2).ids[3:]
    assert len(set(fewer) & {11, 21, 31}) == 2
    assert split_sentence([11, 12, 13]) == ([11], [12, 13])


# ---- lengths, evaluation


@pytest.mark.parametrize("method", ["coconut", "cot", "no_cot", "no_thoughts", "icot", "pause"])
@pytest.mark.parametrize("keys", [{}, {"uniform_prob": 0.5}, {"stage_mixing": "item"}], ids=str)
def test_no_row_is_longer_than_the_longest(method: str, keys: dict) -> None:
    run = config(method, c_thought=2, max_latent_stage=2, **keys)
    stages = range(4)
    lengths = []
    for i in range(200):
        rng = item_rng(0, 0, i)
        stage = draw_stage(run, i % 4, 3, rng)
        lengths.append(len(training_row(run, ITEM, stage, MARKERS, rng).ids))
    assert longest_row(run, ITEM, stages) == max(lengths)


def test_the_longest_recall_row_repeats_the_longest_sentence() -> None:
    assert longest_row(config("recall", recall_sentences=10), ITEM, [0]) == 3 + 3 * 3


@pytest.mark.parametrize(
    "keys, made_with, expected",
    [
        ({"stage": 2, "resume": 12}, {"stage": 5}, (2, "key stage")),
        ({"resume": 12}, {"stage": 5}, (4, "resume: 12 // 3 epochs per stage")),
        ({}, {"stage": 5}, (5, "the checkpoint's own")),
        ({}, None, (0, "epoch 0")),
        ({"method": "pause"}, None, (4, "epoch 0")),
    ],
)
def test_the_stage_of_an_evaluation_and_why(
    keys: dict, made_with: dict | None, expected: tuple[int, str]
) -> None:
    run = config(**{"epochs_per_stage": 3, "max_latent_stage": 3, **keys})
    assert evaluation_stage(run, made_with) == expected
