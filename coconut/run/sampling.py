"""Several outputs of every prompt: greedy answers, votes, answers after a given beginning."""

from collections.abc import Callable, Sequence

import numpy as np

from coconut.batches.batch import chunks, collate
from coconut.batches.curriculum import Row
from coconut.batches.decoding import Decoding
from coconut.batches.questions import Questions
from coconut.run.start import Run


def decoding_of(
    questions: Questions, temperature: float = 0.0, most: int | None = None
) -> Decoding:
    """How outputs of a data set are drawn, until a turn or a stop token ends them."""
    return Decoding(
        most or questions.config.new_tokens,
        questions.end_id,
        temperature,
        questions.config.seed,
        lambda tokens: tokens[-1] in questions.stop_ids,
    )


def decode_rows(
    run: Run,
    prompts: Sequence[Row],
    questions: Questions,
    k: int,
    temperature: float,
    most: int | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> list[list[list[int]]]:
    """k outputs of every prompt, which is read once for all of them. most: tokens of an output."""
    config, backend = run.config, run.backend
    decoding = decoding_of(questions, temperature, most)
    # Like lengths go together, so that little is padded.
    order = np.argsort([len(prompt.ids) for prompt in prompts], kind="stable")
    source, sample = np.repeat(order, k), np.tile(np.arange(k), len(order))
    out: list[list[list[int]]] = [[[]] * k for _ in prompts]

    def said(part: np.ndarray) -> list[list[int]]:
        used, of_row = np.unique(source[part], return_inverse=True)
        batch = collate([prompts[i] for i in used], questions.tokenizer.pad_id)
        # A number of its own for each sample names its random stream, whatever the batches.
        streams = [(prompts[source[r]].idx * k + int(sample[r]),) for r in part]
        return [row.tokens for row in backend.sample(batch, decoding, of_row, streams)]

    parts = list(chunks(np.arange(len(source)), config.eval_batch_size))
    for part, rows in zip(parts, run.world.deal(parts, said, advance), strict=True):
        for r, tokens in zip(part, rows, strict=True):
            out[source[r]][sample[r]] = tokens
    return out
