"""LaTRO's host side against the published functions, and what they should have been."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import examples
from golden_models import golden
from hypothesis import given
from hypothesis import strategies as st

from coconut.batches import credit, rollouts
from coconut.batches.credit import leave_one_out
from coconut.batches.curriculum import Row
from coconut.batches.rollouts import Stops, collate_rollouts, make_rollout
from coconut.config import latro_keys

GOLDEN_TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
"""Observed 6e-7, the golden values' float32."""


def no_text(tokens):
    raise AssertionError("these stops need no text")


def letters(tokens) -> str:
    """A code of pieces of text for tests: 0.. are letters, the last ones longer."""
    return "".join(PIECES[t] for t in tokens)


PIECES = [
    *"abcdefghij",
    " ",
    "\n",
    "The answer",
    " is",
    "The",
    " answer is",
    ".\n",
    "x The",
    "",
    "é",
]


def encode(text: str) -> list[int]:
    """Greedy, longest piece first."""
    ids = []
    while text:
        piece = max((p for p in PIECES if p and text.startswith(p)), key=len)
        ids.append(PIECES.index(piece))
        text = text[len(piece) :]
    return ids


def golden_stops(stop_token_ids) -> Stops:
    singles = frozenset(t for t in stop_token_ids if isinstance(t, int))
    lists = tuple(tuple(t) for t in stop_token_ids if isinstance(t, list))
    return Stops(singles, no_text, sequences=lists)


# ---- truncation


@pytest.mark.parametrize("case", golden("latro")["truncate_response"], ids=lambda c: c["name"])
def test_golden_truncation(case):
    inputs, outputs = case["inputs"], case["outputs"]
    stops, pad = golden_stops(inputs["stop_token_ids"]), inputs["pad_token_id"]
    for tokens, expected, last in zip(
        inputs["responses"], outputs["responses"], outputs["ending_indices"], strict=True
    ):
        cut = stops.cut(tokens)
        assert tokens[: cut.n_kept] + [pad] * (len(tokens) - cut.n_kept) == expected
        assert cut.n_kept == last + 1
        assert cut.is_finished == (pad in expected)


@pytest.mark.parametrize(
    "text, kept, said",
    [
        ("abThe answer is.", "ab", "abThe answer is"),
        ("The answer isa", "", "The answer is"),
        ("ab", "ab", None),
        ("abThe answer", "abThe answer", None),
    ],
)
def test_stop_strings_are_found_in_the_text_and_mapped_back_to_tokens(text, kept, said):
    stops = Stops(frozenset(), letters, strings=("The answer is",))
    tokens = [PIECES.index(p) for p in text] if text == "ab" else encode(text.replace(".", ""))
    cut = stops.cut(tokens)
    assert letters(tokens[: cut.n_kept]) == kept
    assert cut.is_finished == (said is not None)
    assert letters(tokens[: cut.n_spoken]) == (said or letters(tokens))


def test_other_tokenisations_of_a_stop_string_stop_as_well():
    stops = Stops(frozenset(), letters, strings=("The answer is",))
    one = [0, PIECES.index("The answer"), PIECES.index(" is"), 1]
    other = [0, PIECES.index("The"), PIECES.index(" answer is"), 1]
    assert [stops.cut(one).n_kept, stops.cut(other).n_kept] == [1, 1]
    by_ids = Stops(frozenset(), letters, sequences=(tuple(one[1:3]),))
    assert [by_ids.cut(one).is_finished, by_ids.cut(other).is_finished] == [True, False]


def test_a_token_that_is_partly_of_the_stop_is_not_kept():
    stops = Stops(frozenset(), letters, strings=("The answer is",))
    cut = stops.cut([0, PIECES.index("x The"), PIECES.index(" answer is"), 1])
    assert (cut.n_kept, cut.n_spoken) == (1, 3)


def test_the_earliest_of_several_stops_counts():
    stops = Stops(frozenset({9}), letters, strings=("bc", "cd"), sequences=((0, 1),))
    assert stops.cut([5, 6, 1, 2, 3, 9]).n_kept == 2
    assert stops.cut([5, 9, 1, 2, 3]).n_kept == 1
    assert stops.cut([0, 1, 2, 9]).n_kept == 0
    assert not stops.cut([5, 6, 7]).is_finished


@examples(200)
@given(st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=12))
def test_generation_ends_exactly_where_the_cut_finds_a_stop(tokens):
    stops = Stops(frozenset({9}), letters, strings=("The answer is", "ab"), sequences=((2, 3),))
    n = next((n for n in range(1, len(tokens) + 1) if stops.ended(tokens[:n])), None)
    cut = stops.cut(tokens)
    assert (n is not None) == cut.is_finished
    if n is not None:
        at_the_end = stops.cut(tokens[:n])
        assert at_the_end.is_finished
        assert at_the_end.n_kept <= at_the_end.n_spoken == n


# ---- sequences


def rollout(tokens, separator="\n", include_stop=True, prompt=(4, 5), answer=(7, 8), **keys):
    stops = Stops(frozenset({9}), letters, strings=("The answer is",))
    row = Row(0, list(prompt), None, keys.get("first_latent", -1), keys.get("n_latents", 0))
    return make_rollout(row, tokens, answer, stops, separator, encode, include_stop)


def test_every_answer_follows_the_same_separator_however_the_rationale_was_cut():
    newline, space, full_stop = PIECES.index("\n"), PIECES.index(" "), PIECES.index(".\n")
    for end in ([], [newline], [space, newline], [newline, newline]):
        cut = rollout([0, 1, *end, 9])
        assert cut.prompt + cut.shared + cut.bridge + cut.answer == [4, 5, 0, 1, newline, 7, 8]
        assert cut.said == [0, 1, *end, 9]  # the policy is held to what it said
    assert "." not in PIECES  # so that the shortened token has to be encoded anew
    PIECES.append(".")
    try:
        cut = rollout([0, full_stop, 9])
    finally:
        PIECES.pop()
    assert (cut.shared, cut.bridge) == ([0], [len(PIECES), newline])
    assert cut.said == [0, full_stop, 9]


def test_the_stop_counts_for_the_policy_but_not_for_the_reward():
    tokens = [0, 1, PIECES.index("The answer"), PIECES.index(" is")]
    with_stop, without = rollout(tokens), rollout(tokens, include_stop=False)
    assert with_stop.said == tokens and without.said == [0, 1]
    assert with_stop.bridge == without.bridge and with_stop.n_said == without.n_said == 2
    assert rollout([9]).said == [9] and rollout([9], include_stop=False).said == []
    assert not rollout([0, 1]).is_finished


@examples(100)
@given(
    st.lists(
        st.tuples(*[st.lists(st.integers(0, 9), min_size=n, max_size=5) for n in (1, 0, 0, 0, 1)]),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([0, -1]),
    st.sampled_from([1, 8]),
)
def test_a_batch_holds_every_token_once_in_order_and_scores_the_named_spans(
    parts, offset, multiple
):
    rows = [
        rollouts.Rollout(*map(list, part), n_said=len(part[1]), is_finished=True) for part in parts
    ]
    batch = collate_rollouts(rows, pad_id=99, pad_multiple=multiple, reward_offset=offset)
    width = batch.ids.shape[1]
    for i, r in enumerate(rows):
        branch = r.bridge + r.answer
        assert batch.ids[i][batch.mask[i]].tolist() == r.prompt + r.shared + r.tail + branch
        mine = np.flatnonzero(batch.target_row[: batch.n_real] == i)
        answers = batch.target_is_answer[mine]
        path = r.prompt + r.shared + branch
        scored = batch.target_ids[mine[answers]].tolist()
        first = len(path) - len(r.answer) + offset
        # Nothing stands before a prompt's first token, so it is no target.
        assert scored == path[max(first, 1) :]
        assert batch.target_ids[mine[~answers]].tolist() == r.said
        # What stands before a target is what the token was drawn or read after.
        before = batch.target_index[mine] - i * width
        expected = [*(r.prompt + r.said)[len(r.prompt) - 1 : -1]] if r.said else []
        assert batch.ids[i][before[~answers]].tolist() == expected
        positions = batch.positions[i][before[answers]].tolist()
        first = max(first, 1)
        assert batch.ids[i][before[answers]].tolist() == path[first - 1 : -1]
        assert positions == list(range(first - 1, len(path) - 1))
        assert (before >= 0).all() and (before < width).all()


def test_a_reward_that_begins_early_begins_behind_the_first_token_of_all():
    short = rollouts.Rollout([4], [], [], [], [7, 8], 0, False)
    longer = rollouts.Rollout([4], [5], [], [], [7, 8], 1, False)
    batch = collate_rollouts([short, longer], pad_id=99, reward_offset=-1)
    read = batch.target_ids[batch.target_is_answer]
    assert read.tolist() == [7, 8, 5, 7, 8]
    before = batch.ids.reshape(-1)[batch.target_index]
    assert before[batch.target_is_answer].tolist() == [4, 7, 4, 5, 7]


# ---- rewards


@pytest.mark.parametrize("case", golden("latro")["rloo"], ids=lambda c: c["name"])
def test_golden_rewards_and_advantages(case):
    inputs, outputs = case["inputs"], case["outputs"]
    finished = np.array([inputs["pad_token_id"] in r for r in inputs["truncated_responses"]])
    assert finished.tolist() == outputs["contain_stop_token"]
    found = credit.credit(
        *(np.array(inputs[name]) for name in ("rewards", "logprobs", "ref_logprobs")),
        finished,
        inputs["rloo_k"],
        inputs["kl_coef"],
        "batch_mean" if inputs["non_stop_penalty"] else None,
        inputs["penalty_reward_value"],
    )
    for ours, theirs in (
        (found.penalised, "rewards_after_penalty"),
        (found.kl_penalty, "kl_penalty"),
        (found.adjusted, "adjusted_rewards"),
        (found.advantages, "advantages"),
    ):
        np.testing.assert_allclose(ours, outputs[theirs], **GOLDEN_TOLERANCE)


def test_advantages_are_what_leaving_one_out_says():
    r = np.random.default_rng(0).normal(size=(5, 4))
    a = leave_one_out(r)
    by_definition = [[x - np.delete(row, k).mean() for k, x in enumerate(row)] for row in r]
    np.testing.assert_allclose(a, by_definition, atol=1e-12)
    np.testing.assert_allclose(a.sum(axis=1), 0, atol=1e-12)
    np.testing.assert_allclose(a, 4 / 3 * (r - r.mean(axis=1, keepdims=True)), atol=1e-12)
    np.testing.assert_allclose(leave_one_out(r + np.arange(5)[:, None]), a, atol=1e-12)
    np.testing.assert_array_equal(leave_one_out(np.full((2, 3), 7.0)), 0)
    (pair,) = leave_one_out(np.array([[3.0, 5.0]]))
    assert pair.tolist() == [-2.0, 2.0]
    changed = r.copy()
    changed[2] += [0, 5, 0, 0]
    assert (leave_one_out(changed)[[0, 1, 3, 4]] == a[[0, 1, 3, 4]]).all()
    with pytest.raises(ValueError, match="at least 2 samples"):
        leave_one_out(np.zeros((3, 1)))


def test_a_penalty_worsens_unless_it_is_the_released_one():
    rewards = np.array([-1.0, -9.0, -2.0, -2.0])
    finished = np.array([True, False, False, True])
    assert credit.penalised(rewards, finished, 2, "constant", 2).tolist() == [-1, -11, -4, -2]
    assert credit.penalised(rewards, finished, 2, "group_mean", 2).tolist() == [-1, -10, -4, -2]
    assert credit.penalised(rewards, finished, 2, "batch_mean", 2).tolist() == [-1, -7, -7, -2]
    mild = credit.penalised(np.array([-1.0, -9.0]), np.array([True, False]), 2, "group_mean", 1.2)
    assert mild.tolist() == [-1, -9]


def test_the_published_stop_strings_are_eighteen():
    assert len(latro_keys.STOP_SEQS) == len(set(latro_keys.STOP_SEQS)) == 18
