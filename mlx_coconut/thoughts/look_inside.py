"""Inside a thought: read-outs and attention at the latents, probabilities of texts behind them."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from coconut.batches.batch import Batch
from coconut.batches.results import Trace
from coconut.blocks import NEVER, recorded_attention
from coconut.feedback.attached import prepare
from mlx_coconut.models.cache import DecodeCache
from mlx_coconut.thoughts.inputs import Inputs
from mlx_coconut.thoughts.latent import latent_forward

ROWS = 32
"""Continuations read at once; each holds a copy of its prompt's keys and values."""


def trace(model, batch: Batch, n_passes: int) -> Trace:
    """States, thoughts, read-outs and attention at every latent of one row.

    batch: one prompt. n_passes 0: latents are ordinary tokens, and a thought is only a state.
    """
    columns = np.flatnonzero(batch.is_latent[0])
    with recorded_attention() as record:
        plan, prepared = (batch.first_latent, n_passes), prepare(model, batch, (0,))
        state = latent_forward(model, Inputs.of(batch), *plan, prepared=prepared)
    before = state.hidden[0][mx.array(columns - 1)]
    n_layers, T = len(model.layers), batch.ids.shape[1]
    n_heads = record[0].shape[1]
    attention = np.zeros((len(columns), n_layers, n_heads, T), np.float32)
    for i, column in enumerate(columns):
        for layer in range(n_layers):
            weights = _row_of(record[layer::n_layers], int(column))
            attention[i, layer, :, : weights.shape[1]] = _float32(weights)
    rows = model.embed(mx.arange(model.args.vocab_size))
    return Trace(
        states=_float32(before),
        thoughts=_float32(mx.concatenate(state.thoughts) if n_passes else before),
        logprobs=_float32(_log_softmax(model.head(before))),
        attention=attention,
        embedding_norms=_float32(mx.linalg.norm(rows.astype(mx.float32), axis=-1)),
    )


def continuation_logprobs(
    model, batch: Batch, n_passes: int, continuations: Sequence[Sequence[Sequence[int]]]
) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """Log-probabilities, in nats, of the token behind each prompt and of whole continuations.

    batch: B prompts as collated. continuations: for each prompt, token lists to read behind it.
    Returns (B, V), and for each prompt and continuation an array with a number a token. A prompt
    is computed once, whatever the number of its continuations.
    """
    plan, prepared = (batch.first_latent, n_passes), prepare(model, batch, (0,))
    state = latent_forward(model, Inputs.of(batch), *plan, prepared=prepared)
    B, T = batch.ids.shape
    last = T - 1 - np.argmax(batch.mask[:, ::-1], axis=1)
    hidden = state.hidden[mx.arange(B), mx.array(last)]
    first = _float32(_log_softmax(model.head(hidden)))
    found = [[first[b, part[:1]] for part in parts] for b, parts in enumerate(continuations)]
    longer = [
        (b, c) for b, parts in enumerate(continuations) for c, p in enumerate(parts) if len(p) > 1
    ]
    for start in range(0, len(longer), ROWS):
        chunk = longer[start : start + ROWS]
        prompts = np.array([b for b, _ in chunk])
        lists = [continuations[b][c] for b, c in chunk]
        n = max(map(len, lists)) - 1
        ids = np.zeros((len(chunk), n), np.int32)
        targets = np.zeros((len(chunk), n), np.int32)
        for r, tokens in enumerate(lists):
            ids[r, : len(tokens) - 1], targets[r, : len(tokens) - 1] = tokens[:-1], tokens[1:]
        # Pads stand at the end, where the causal rule alone hides them.
        future = np.triu(np.ones((n, n), bool), 1)
        hides = [np.broadcast_to(~batch.mask[prompts, None], (len(chunk), n, T))]
        hides.append(np.broadcast_to(future, (len(chunk), n, n)))
        positions = batch.positions[prompts, last[prompts], None] + 1 + np.arange(n)
        cache = DecodeCache(state.cache, prompts, model.shares_prompts)
        x = model.embed(mx.array(ids))
        hidden_keys = np.concatenate(hides, axis=2)[:, None] * np.float32(NEVER)
        mask = mx.array(hidden_keys).astype(x.dtype)
        states = model.trunk(x, mx.array(positions), mask, cache)
        logprobs = _log_softmax(model.head(states))
        chosen = mx.take_along_axis(logprobs, mx.array(targets)[..., None], axis=-1)[..., 0]
        for (b, c), tokens, values in zip(chunk, lists, _float32(chosen), strict=True):
            found[b][c] = np.concatenate([found[b][c], values[: len(tokens) - 1]])
    return first, found


def _row_of(passes: Sequence[mx.array], column: int) -> mx.array:
    """One layer's weights (H, keys) of the query in a column, from that layer's record."""
    for weights in passes:
        end = weights.shape[3]
        if column < end:
            return weights[0, :, column - end]
    raise AssertionError("every column is computed in some pass")


def _log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _float32(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))
