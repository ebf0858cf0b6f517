"""Rows -> Batch: latents aligned, pads masked, lengths bucketed, the pass plan made. Numpy only.

x x x x S L L E x x x -      x token, S and E markers, L latent, - pad
- - x x S L E x x x x x      left pads put every first latent into one column,
- x x x S L L E x x - -      so the k-th thought of all rows is computed in one pass
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from coconut.batches.curriculum import IGNORED, Row

TARGET_MULTIPLE = 64
"""Target lists are padded to a multiple of this, so that few shapes occur."""


@dataclass(frozen=True)
class Beginning:
    """Columns that several rows of a batch have in common, so that they are computed once.

    width: columns [0, width). source (B,): which beginning each row goes on from, from 0; first
    (P,): a row that holds it, for each. Rows of one source are the same in these columns.
    """

    width: int
    source: np.ndarray
    first: np.ndarray


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs, as numpy arrays and plain numbers.

    ids (B, T) int32; labels (B, T) int32, IGNORED where no loss is taken; mask (B, T) bool, True on
    real tokens; positions (B, T) int32, 0 on pads; is_latent (B, T) bool; idx (B,) item numbers.
    first_latent: column of every row's first latent (T if no row has one); n_passes: largest
    number of latents of a row, which is the number of thoughts computed one after another.
    target_index (N,) int32: flat indices into (B * T) of the positions whose *next* token counts;
    target_ids (N,) int32 those tokens; target_weight (N,) float32, 0 on the padding of the list.
    segments (B, T) int32: branches of a row; 0 is seen by all behind it, another number by its own
    only. None: there are no branches. beginning: what rows have in common; None: nothing.
    """

    ids: np.ndarray
    labels: np.ndarray
    mask: np.ndarray
    positions: np.ndarray
    is_latent: np.ndarray
    idx: np.ndarray
    first_latent: int
    n_passes: int
    target_index: np.ndarray
    target_ids: np.ndarray
    target_weight: np.ndarray
    segments: np.ndarray | None = None
    beginning: Beginning | None = None

    @property
    def n_targets(self) -> int:
        """Labels that count."""
        return int(self.target_weight.sum())

    @property
    def n_tokens(self) -> int:
        """Real tokens."""
        return int(self.mask.sum())

    @property
    def shape_key(self) -> tuple[int, ...]:
        """Everything a compiled step is traced anew for."""
        return (*self.ids.shape, self.first_latent, self.n_passes, len(self.target_index))


def collate(
    rows: Sequence[Row],
    pad_id: int,
    pad_multiple: int = 1,
    source: Sequence[int] | np.ndarray | None = None,
) -> Batch:
    """Align, pad and plan a batch. Rows are not changed.

    pad_multiple: the column of the first latent and the length behind it are rounded up to
    multiples of it; 1 gives the published layout. source: a number a row; what rows of one number
    begin with in common stands in columns of its own, before those of the rest (`Beginning`):

        - x x | - y y L L E        the beginning is padded left, and what goes on from it
        - x x | y y y L E -        so that latents share columns here too
    """
    beginning, begun, shared = None, [0] * len(rows), 0
    if source is not None:
        _, first, of_row = np.unique(source, return_index=True, return_inverse=True)
        members = [np.flatnonzero(of_row == number) for number in range(len(first))]
        common = [_common([rows[r] for r in own.tolist()]) for own in members]
        begun, shared = [common[number] for number in of_row], max(common)
        if shared:
            beginning = Beginning(shared, of_row, first)
    latent_rows = [(row, n) for row, n in zip(rows, begun, strict=True) if row.n_latents]
    column = max((shared + row.first_latent - n for row, n in latent_rows), default=0)
    if latent_rows:
        column = round_up(column, pad_multiple)
    # Where each row would begin if it had nothing in common, and its first own column.
    lefts = [
        (column - row.first_latent if row.n_latents else shared - n)
        for row, n in zip(rows, begun, strict=True)
    ]
    width = max(left + len(row.ids) for left, row in zip(lefts, rows, strict=True))
    width = column + round_up(width - column, pad_multiple)

    shape = (len(rows), width)
    ids = np.full(shape, pad_id, np.int32)
    labels = np.full(shape, IGNORED, np.int32)
    mask = np.zeros(shape, bool)
    positions = np.zeros(shape, np.int32)
    is_latent = np.zeros(shape, bool)
    for r, (left, n, row) in enumerate(zip(lefts, begun, rows, strict=True)):
        span = np.r_[shared - n : shared, left + n : left + len(row.ids)]
        ids[r, span] = row.ids
        mask[r, span] = True
        positions[r, span] = np.arange(len(row.ids))
        if row.labels is not None:
            labels[r, span] = row.labels
        if row.n_latents:
            is_latent[r, column : column + row.n_latents] = True

    where, targets = _targets(labels)
    n = round_up(len(where), TARGET_MULTIPLE if pad_multiple > 1 else 1)
    weight = np.zeros(n, np.float32)
    weight[: len(where)] = 1
    return Batch(
        ids=ids,
        labels=labels,
        mask=mask,
        positions=positions,
        is_latent=is_latent,
        idx=np.array([row.idx for row in rows], np.int64),
        first_latent=column if latent_rows else width,
        n_passes=max(row.n_latents for row in rows),
        target_index=np.resize(where, n) if len(where) else np.zeros(n, np.int32),
        target_ids=np.resize(targets, n) if len(where) else np.zeros(n, np.int32),
        target_weight=weight,
        beginning=beginning,
    )


def _common(rows: Sequence[Row]) -> int:
    """Tokens that rows begin with in common: before their latents, and never a whole row."""
    most = min(row.first_latent - 1 if row.n_latents else len(row.ids) - 1 for row in rows)
    heads = np.array([row.ids[:most] for row in rows])
    differs = (heads != heads[0]).any(axis=0)
    return int(np.argmax(differs)) if differs.any() else most


def _targets(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat positions whose next label counts, and those labels, in order of row and column."""
    rows, columns = np.nonzero(labels[:, 1:] != IGNORED)
    flat = rows * labels.shape[1] + columns
    return flat.astype(np.int32), labels[rows, columns + 1].astype(np.int32)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def rows_of(source: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows sorted by the prompt they go on from: (prompts (P,), table (P, M), place (R,)).

    source (R,): the prompt of each row. prompts: those in use, ascending. table: the rows of each,
    filled up with row 0 to M, the most of any. place: where each row stands in the flat table.
    """
    prompts, prompt, counts = np.unique(source, return_inverse=True, return_counts=True)
    order = np.argsort(prompt, kind="stable")
    column = np.empty_like(order)
    column[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.zeros((len(prompts), counts.max()), np.int64)
    table[prompt, column] = np.arange(len(source))
    return prompts, table, prompt * counts.max() + column


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The shuffled order of n items in an epoch; depends on nothing else."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def chunks(order: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Successive micro-batches of item numbers; the last may be short."""
    for start in range(0, len(order), size):
        yield order[start : start + size]


def by_length(lengths: Sequence[int], size: int) -> Iterator[np.ndarray]:
    """Batches of item numbers; like lengths go together, so that little is padded."""
    return chunks(np.argsort(lengths, kind="stable"), size)


def grouped(order: np.ndarray, size: int, n: int) -> list[list[tuple[int, np.ndarray]]]:
    """n micro-batches (number, item numbers) an update; the last update may have fewer."""
    numbered = list(enumerate(chunks(order, size)))
    return [numbered[start : start + n] for start in range(0, len(numbered), n)]
