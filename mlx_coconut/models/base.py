"""What every architecture shares: attention over cached segments, dropout, masks."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from coconut.blocks import NEVER, RECORD
from coconut.caches import Shared
from mlx_coconut.models.cache import Segment, SegmentCache
from mlx_coconut.models.cpu import gelu_new, replaces, softmax

Mask = mx.array | None
"""To add to the scores, see `additive_mask`; or nothing."""

Key = mx.array | None
"""Of one random draw; None: nothing is drawn, there is no dropout."""

ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate"), gelu_new),
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_python_tanh"), gelu_new),
    **dict.fromkeys(("gelu", "gelu_python"), nn.gelu),
    "gelu_10": lambda x: mx.clip(nn.gelu(x), -10, 10),
    "quick_gelu": lambda x: x * mx.sigmoid(1.702 * x),
    "relu": nn.relu,
    "relu2": lambda x: mx.square(nn.relu(x)),
    "relu6": nn.relu6,
    "leaky_relu": nn.leaky_relu,
    **dict.fromkeys(("silu", "swish"), nn.silu),
    "mish": nn.mish,
    "hardswish": nn.hardswish,
    "tanh": mx.tanh,
    "sigmoid": mx.sigmoid,
    "laplace": lambda x: 0.5 * (1 + mx.erf((x - 0.707107) / (0.282095 * 2**0.5))),
    "linear": lambda x: x,
}
"""What transformers computes under these names, elementwise."""


def additive_mask(
    key_mask: mx.array, start: int, end: int, dtype: mx.Dtype, segments: mx.array | None = None
) -> mx.array:
    """Mask (B, 1, end - start, end) to add to the scores of queries in columns start..end.

    key_mask: (B, >= end) bool, True on real tokens. A query sees the real keys up to its own
    column, and itself even if it is a pad: a row without any allowed key would be NaN.
    segments: (B, >= end), branches of a row; see Batch.segments.
    """
    columns = mx.arange(end)
    queries = columns[start:, None]
    causal = columns[None] <= queries
    itself = columns[None] == queries
    allowed = (causal & key_mask[:, None, :end]) | itself
    if segments is not None:
        of_key, of_query = segments[:, None, :end], segments[:, start:end, None]
        allowed = allowed & ((of_key == 0) | (of_key == of_query))
    # Arithmetic instead of `where`, which is 30 times slower on MLX's CPU back end.
    return ((1 - allowed.astype(mx.float32)) * NEVER).astype(dtype)[:, None]


def attend(
    q: mx.array,
    keys: Sequence[Segment],
    values: Sequence[Segment],
    mask: Mask,
    dropout_rate: float = 0.0,
    key: Key = None,
) -> mx.array:
    """Scaled dot-product attention over keys kept in segments; the segments are never joined.

    q (B, H, T, d); each of keys and values (B, G, S_i, d) with H a multiple of G; mask as from
    `additive_mask`, its last axis the sum of S_i, or None: all keys are seen. Returns (B, H, T, d).
    Joining would copy every key of the question once a latent pass and keep the copies for the
    backward pass.
    """
    if (record := RECORD.get()) is not None:
        record.append(attention_weights(q, keys, mask))
    scale = q.shape[-1] ** -0.5
    drops = key is not None and dropout_rate > 0
    B, H, T, d = q.shape
    if len(keys) == 1 and not drops and not replaces(q.dtype, B * H * T * keys[0].shape[2]):
        return mx.fast.scaled_dot_product_attention(q, keys[0], values[0], scale=scale, mask=mask)
    G = keys[-1].shape[1]
    grouped = (q * scale).reshape(B, G, H // G * T, d)
    parts = [_multiply(grouped, k, transposed=True) for k in keys]
    scores = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
    if mask is not None:
        scores = (scores.reshape(B, H, T, -1) + mask).reshape(scores.shape)
    p = softmax(scores)
    if drops:
        p = dropout(p, dropout_rate, key)
    out, start = None, 0
    for v, of_v in zip(values, parts, strict=True):
        part = _multiply(p[..., start : start + of_v.shape[-1]], v)
        out = part if out is None else out + part
        start += of_v.shape[-1]
    return out.reshape(B, H, T, d)


def _multiply(x: mx.array, segment: Segment, transposed: bool = False) -> mx.array:
    shared = isinstance(segment, Shared)
    matrix = segment.array if shared else segment
    matrix = matrix.swapaxes(-1, -2) if transposed else matrix
    return segment.sharing.multiply(x, matrix) if shared else x @ matrix


def attention_weights(q: mx.array, keys: Sequence[mx.array], mask: Mask) -> mx.array:
    """What each query takes from each key: (B, H, T, sum of S_i), every row sums to 1, float32.

    Arguments as for `attend`, which itself never holds these weights as one array.
    """
    B, H, T, d = q.shape
    k = mx.concatenate(list(keys), axis=2).astype(mx.float32)
    grouped = (q.astype(mx.float32) * d**-0.5).reshape(B, k.shape[1], -1, d)
    scores = (grouped @ k.swapaxes(-1, -2)).reshape(B, H, T, -1)
    return mx.softmax(scores if mask is None else scores + mask, axis=-1)


def dropout(x: mx.array, rate: float, key: Key) -> mx.array:
    """Inverted dropout from an explicit key; no key or rate 0 leaves x as it is.

    An explicit key makes a recomputed block (gradient checkpointing) drop the same elements, and a
    resumed run the same as an unbroken one.
    """
    if key is None or rate == 0:
        return x
    kept = mx.random.bernoulli(1 - rate, x.shape, key=key)
    return x * (kept.astype(x.dtype) * (1 / (1 - rate)))


def split_key(key: Key, n: int) -> list[Key]:
    """n keys out of one; n times None out of None (no dropout)."""
    return [None] * n if key is None else list(mx.random.split(key, n))


def checkpointed(block) -> Callable[..., mx.array]:
    """The block, recomputed in the backward pass instead of keeping its activations.

    Whatever else all blocks of a pass are given (rotations) may follow the key.
    As a pure function: parameters and the earlier keys and values go in, the new ones come out.
    """

    @mx.checkpoint
    def pure(parameters, x, mask, keys, values, key, *shared):
        block.update(parameters)
        if key is not None:
            # Recomputing asks for every input's gradient; drawing random bits has none.
            key = mx.stop_gradient(key)
        past = SegmentCache(1)
        past.keys[0], past.values[0] = keys, values
        out = block(x, mask, past, 0, key, *shared)
        return out, past.keys[0][-1], past.values[0][-1]

    def run(x, mask, cache, layer, key, *shared):
        parameters = block.trainable_parameters()
        past = (cache.keys[layer], cache.values[layer])
        out, k, v = pure(parameters, x, mask, *past, key, *shared)
        cache.update(layer, k, v)
        return out

    return run
