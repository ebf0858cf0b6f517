"""Collating: the reference's layout exactly, buckets, targets, order."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from golden_models import TOKENS, as_row, golden

from coconut.batches.batch import TARGET_MULTIPLE, chunks, collate, epoch_order, rows_of
from coconut.batches.curriculum import IGNORED, Row

EOS, LATENT = TOKENS["eos"], TOKENS["latent"]
CALLS = golden("staging")["calls"]
LAYOUT = {
    "ids": "input_ids",
    "mask": "attention_mask",
    "labels": "labels",
    "positions": "position_ids",
}


def golden_rows(numbers: list[int]) -> list[Row]:
    found = [golden("staging")["rows"][number] for number in numbers]
    return [as_row(r["idx"], r["input_ids"], r.get("labels")) for r in found]


def groups() -> list[tuple[list[int], dict]]:
    """(row numbers, collated batch) of every distinct batch of the reference."""
    found = {}
    for call in CALLS:
        train, first, second = call["train_rows"], *call["train_batch_small"]
        found[call["train_batch"]] = train
        found[first], found[second] = train[:2], train[2:5]
        found[call["question_batch"]] = call["question_rows"]
    return [(rows, golden("staging")["batches"][number]) for number, rows in found.items()]


def test_every_golden_batch_is_reproduced_exactly() -> None:
    assert len(groups()) == len(golden("staging")["batches"])
    for numbers, theirs in groups():
        ours = collate(golden_rows(numbers), EOS)
        for name, key in LAYOUT.items():
            if key in theirs:
                np.testing.assert_array_equal(getattr(ours, name), np.array(theirs[key]))
        assert ours.ids.dtype == ours.labels.dtype == ours.positions.dtype == np.int32
        assert ours.mask.dtype == ours.is_latent.dtype == bool


def test_latents_share_a_column_in_every_golden_batch() -> None:
    for numbers, _ in groups():
        batch = collate(golden_rows(numbers), EOS)
        np.testing.assert_array_equal(batch.is_latent, (batch.ids == LATENT) & batch.mask)
        counts = batch.is_latent.sum(1)
        assert batch.n_passes == counts.max()
        if batch.n_passes:
            assert (batch.is_latent.argmax(1)[counts > 0] == batch.first_latent).all()
        else:
            assert batch.first_latent == batch.ids.shape[1]


def test_the_layout_drawn_in_the_module() -> None:
    rows = [
        as_row(0, [1, 2, 3, 4, LATENT, LATENT, 5], None),
        as_row(1, [1, 2, LATENT, 6, 7, 8, 9], [IGNORED] * 3 + [6, 7, 8, 9]),
        as_row(2, [1, 2, 3], [1, 2, 3]),
    ]
    batch = collate(rows, pad_id=0)
    L = LATENT
    assert batch.ids.tolist() == [
        [1, 2, 3, 4, L, L, 5, 0, 0],
        [0, 0, 1, 2, L, 6, 7, 8, 9],
        [1, 2, 3, 0, 0, 0, 0, 0, 0],
    ]
    assert batch.positions.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 0, 0],
        [0, 0, 0, 1, 2, 3, 4, 5, 6],
        [0, 1, 2, 0, 0, 0, 0, 0, 0],
    ]
    assert batch.labels[0].tolist() == [IGNORED] * 9
    assert (batch.first_latent, batch.n_passes) == (4, 2)
    assert batch.idx.tolist() == [0, 1, 2]
    # Positions whose next token counts: column 4..7 of row 1, then 0 and 1 of row 2.
    assert batch.target_index.tolist() == [9 + 4, 9 + 5, 9 + 6, 9 + 7, 18, 19]
    assert batch.target_ids.tolist() == [6, 7, 8, 9, 2, 3]
    assert (batch.n_targets, batch.n_tokens) == (6, 17)


def test_rows_are_not_changed_and_collating_again_gives_the_same() -> None:
    for numbers, _ in groups():
        rows = golden_rows(numbers)
        before = copy.deepcopy(rows)
        first, second = collate(rows, EOS), collate(rows, EOS)
        assert rows == before
        for name in first.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("multiple", [2, 8, 32])
def test_buckets_change_neither_tokens_nor_targets(multiple: int) -> None:
    for numbers, _ in groups():
        rows = golden_rows(numbers)
        plain, wide = collate(rows, EOS), collate(rows, EOS, multiple)
        for name in ("ids", "labels", "positions", "is_latent"):
            for r in range(len(rows)):
                np.testing.assert_array_equal(
                    getattr(plain, name)[r][plain.mask[r]], getattr(wide, name)[r][wide.mask[r]]
                )
        assert (wide.labels[~wide.mask] == IGNORED).all()
        assert not wide.is_latent[~wide.mask].any() and not wide.positions[~wide.mask].any()
        n = plain.n_targets
        assert wide.n_targets == n == len(plain.target_ids)
        np.testing.assert_array_equal(wide.target_ids[:n], plain.target_ids)
        assert wide.target_weight.tolist() == [1.0] * n + [0.0] * (len(wide.target_ids) - n)
        assert len(wide.target_ids) % TARGET_MULTIPLE == 0
        # The same token stands before each target.
        before = [b.ids.reshape(-1)[b.target_index[:n]] for b in (plain, wide)]
        np.testing.assert_array_equal(*before)
        column = wide.first_latent if wide.n_passes else 0
        assert column % multiple == 0 and (wide.ids.shape[1] - column) % multiple == 0


def test_buckets_let_few_shapes_occur() -> None:
    rng = np.random.default_rng(0)
    shapes = set()
    for _ in range(200):
        n_question, n_rest = rng.integers(20, 60, 2)
        ids = [1] * n_question + [LATENT] * 2 + [2] * n_rest
        labels = [IGNORED] * (n_question + 2) + [2] * n_rest
        shapes.add(collate([as_row(0, ids, labels)] * 4, EOS, 32).shape_key)
    assert len(shapes) <= 24


def test_a_batch_of_questions_has_no_targets() -> None:
    batch = collate([as_row(0, [1, 2, 3], None)], EOS)
    assert batch.n_targets == 0 and len(batch.target_index) == 0
    assert collate([as_row(0, [1, 2, 3], None)], EOS, 32).n_targets == 0


def test_an_epoch_visits_every_item_once_in_an_order_of_its_own() -> None:
    orders = [epoch_order(101, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert sorted(order) == list(range(101))
    assert len({tuple(order) for order in orders}) == 3
    np.testing.assert_array_equal(orders[1], epoch_order(101, 0, 1))


def test_chunks_cover_the_order_and_the_last_may_be_short() -> None:
    parts = list(chunks(np.arange(10), 4))
    assert [len(part) for part in parts] == [4, 4, 2]
    assert np.concatenate(parts).tolist() == list(range(10))


@pytest.mark.parametrize(
    "source",
    [[0], [3, 3, 3], [0, 0, 2, 2], [5, 1, 5, 5, 0, 1]],
    ids=["one", "three", "even", "mixed"],
)
def test_rows_are_found_by_their_prompt_and_back(source):
    used, table, place = rows_of(np.array(source))
    assert used.tolist() == sorted(set(source))
    assert table.shape == (len(used), max(source.count(prompt) for prompt in used))
    assert table.reshape(-1)[place].tolist() == list(range(len(source)))
    assert used[place // table.shape[1]].tolist() == source


def test_what_rows_begin_with_in_common_stands_before_all_else():
    def row(idx, ids, first=-1, n=0):
        return Row(idx, ids, None, first, n)

    rows = [row(0, [1, 2, 3, 9, 8, 8], 4, 2), row(1, [5, 6, 9, 8], 3, 1)]
    rows += [row(2, [1, 2, 4, 4, 9, 8], 5, 1), row(3, [5, 7, 7, 9, 8], 4, 1)]
    batch = collate(rows, pad_id=0, source=[4, 7, 4, 7])
    assert batch.beginning.width == 2
    assert batch.beginning.source.tolist() == [0, 1, 0, 1]
    assert batch.beginning.first.tolist() == [0, 1]
    assert batch.ids.tolist() == [
        [1, 2, 0, 3, 9, 8, 8],
        [0, 5, 0, 6, 9, 8, 0],
        [1, 2, 4, 4, 9, 8, 0],
        [0, 5, 7, 7, 9, 8, 0],
    ]
    assert batch.positions[3].tolist() == [0, 0, 1, 2, 3, 4, 0]
    assert (batch.mask == (batch.ids > 0)).all()
    assert (batch.first_latent, batch.n_passes) == (5, 2)
    # A whole row is never common: its last column must be computed for each.
    same = collate([row(0, [1, 2, 3]), row(1, [1, 2, 3])], 0, source=[0, 0])
    assert same.beginning.width == 2
    nothing = collate([row(0, [1, 2]), row(1, [3, 2])], 0, source=[0, 0])
    assert nothing.beginning is None
