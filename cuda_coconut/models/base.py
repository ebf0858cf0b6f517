"""What every architecture shares: attention over cached segments, dropout, masks."""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from coconut.blocks import NEVER, RECORD
from coconut.caches import Shared
from cuda_coconut.models.cache import Segment, SegmentCache

Mask = torch.Tensor | Literal["causal"] | None
"""To add to the scores; or "causal": every query sees the keys up to its own column; or nothing."""

Key = tuple[int, ...] | None
"""Of one random draw: numbers that seed a generator; None: nothing is drawn, no dropout."""

_gelu_new = partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate"), _gelu_new),
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_python_tanh"), _gelu_new),
    **dict.fromkeys(("gelu", "gelu_python"), F.gelu),
    "gelu_10": lambda x: F.gelu(x).clip(-10, 10),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    **dict.fromkeys(("silu", "swish"), F.silu),
    "mish": F.mish,
    "hardswish": F.hardswish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "laplace": lambda x: 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * 2**0.5))),
    "linear": lambda x: x,
}
"""What transformers computes under these names, elementwise."""


def additive_mask(
    key_mask: torch.Tensor,
    start: int,
    end: int,
    dtype: torch.dtype,
    segments: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mask (B, 1, end - start, end) to add to the scores of queries in columns start..end.

    key_mask: (B, >= end) bool, True on real tokens. A query sees the real keys up to its own
    column, and itself even if it is a pad: a row without any allowed key would be NaN.
    segments: (B, >= end), branches of a row; see Batch.segments.
    """
    columns = torch.arange(end, device=key_mask.device)
    queries = columns[start:, None]
    allowed = ((columns <= queries) & key_mask[:, None, :end]) | (columns == queries)
    if segments is not None:
        of_key, of_query = segments[:, None, :end], segments[:, start:end, None]
        allowed = allowed & ((of_key == 0) | (of_key == of_query))
    mask = torch.zeros(allowed.shape, dtype=dtype, device=key_mask.device)
    return mask.masked_fill_(~allowed, NEVER)[:, None]


def attend(
    q: torch.Tensor,
    keys: Sequence[Segment],
    values: Sequence[Segment],
    mask: Mask,
    dropout_rate: float = 0.0,
    key: Key = None,
) -> torch.Tensor:
    """Scaled dot-product attention over keys kept in segments; the segments are never joined.

    q (B, H, T, d); each of keys and values (B, G, S_i, d) with H a multiple of G; mask as from
    `additive_mask`, its last axis the sum of S_i, or None: all keys are seen. Returns (B, H, T, d).
    Joining would copy every key of the question once a latent pass and keep the copies for the
    backward pass.
    """
    drops = key is not None and dropout_rate > 0
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # twin: on a CPU, torch's attention in bfloat16 takes twice the time of float32's.
        with torch.autocast("cpu", enabled=False):
            keys, values = ([_float(segment) for segment in kept] for kept in (keys, values))
            return attend(q.float(), keys, values, mask, dropout_rate, key)
    if (record := RECORD.get()) is not None:
        record.append(attention_weights(q, keys, mask))
    B, H, T, d = q.shape
    G = keys[-1].shape[1]
    causal = isinstance(mask, str)
    if len(keys) == 1 and not drops:
        return F.scaled_dot_product_attention(
            q,
            keys[0],
            values[0],
            attn_mask=None if causal else mask,
            is_causal=causal,
            enable_gqa=G != H,
        )
    if causal:
        mask = torch.full((T, T), NEVER, dtype=q.dtype, device=q.device).triu_(1)
    grouped = (q * d**-0.5).reshape(B, G, H // G * T, d)
    parts = [_multiply(grouped, k, transposed=True) for k in keys]
    scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    if mask is not None:
        scores = (scores.reshape(B, H, T, -1) + mask).view(scores.shape)
    p = scores.softmax(dim=-1, dtype=torch.float32).to(values[-1].dtype)
    if drops:
        p = dropout(p, dropout_rate, key)
    shares = p.split([part.shape[-1] for part in parts], dim=-1)
    out = sum(_multiply(share, v) for share, v in zip(shares, values, strict=True))
    return out.reshape(B, H, T, d)


def _multiply(x: torch.Tensor, segment: Segment, transposed: bool = False) -> torch.Tensor:
    shared = isinstance(segment, Shared)
    matrix = segment.array if shared else segment
    matrix = matrix.transpose(-1, -2) if transposed else matrix
    return segment.sharing.multiply(x, matrix) if shared else x @ matrix


def _float(segment: Segment) -> Segment:
    if isinstance(segment, Shared):
        return Shared(segment.array.float(), segment.sharing)
    return segment.float()


def attention_weights(q: torch.Tensor, keys: Sequence[torch.Tensor], mask: Mask) -> torch.Tensor:
    """What each query takes from each key: (B, H, T, sum of S_i), every row sums to 1, float32.

    Arguments as for `attend`, which itself never holds these weights as one array.
    """
    B, H, T, d = q.shape
    k = torch.cat(list(keys), dim=2).float()
    grouped = (q.float() * d**-0.5).reshape(B, k.shape[1], -1, d)
    scores = (grouped @ k.transpose(-1, -2)).view(B, H, T, -1)
    if isinstance(mask, str):
        mask = torch.full((T, T), NEVER, device=q.device).triu_(1)
    return (scores if mask is None else scores + mask).softmax(dim=-1)


def dropout(x: torch.Tensor, rate: float, key: Key) -> torch.Tensor:
    """Inverted dropout from an explicit key; no key or rate 0 leaves x as it is.

    An explicit key makes a recomputed block (gradient checkpointing) drop the same elements, and a
    resumed run the same as an unbroken one.
    """
    if key is None or rate == 0:
        return x
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    generator = torch.Generator(x.device).manual_seed(int(seed))
    kept = torch.empty_like(x).bernoulli_(1 - rate, generator=generator)
    return x * kept.mul_(1 / (1 - rate))


def as_linear(embedding, h: torch.Tensor) -> torch.Tensor:
    """Products of states (..., D) with the rows of an embedding: the logits of a tied head."""
    # twin: MLX's embeddings have this as a method.
    own = getattr(embedding, "as_linear", None)
    return F.linear(h, embedding.weight) if own is None else own(h)


def without_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a model, run without gradients; under autocast each weight is cast once in it.

    Autocast keeps the casts of leaves that ask for gradients, and none in inference mode: there a
    model's weights were cast anew for every token.
    """

    @wraps(function)
    def run(model, *args, **kwargs):
        if not torch.is_autocast_enabled(model.embedding.device.type):
            with torch.inference_mode():
                return function(model, *args, **kwargs)
        frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
        for p in frozen:
            p.requires_grad_(True)
        try:
            with torch.no_grad():
                return function(model, *args, **kwargs)
        finally:
            for p in frozen:
                p.requires_grad_(False)

    return run


def split_key(key: Key, n: int) -> list[Key]:
    """n keys out of one; n times None out of None (no dropout)."""
    return [None] * n if key is None else [(*key, i) for i in range(n)]


def checkpointed(block) -> Callable[..., torch.Tensor]:
    """The block, recomputed in the backward pass instead of keeping its activations.

    Whatever else all blocks of a pass are given (rotations) may follow the key.
    As a pure function: the earlier keys and values go in, all of them come out.
    """

    def pure(x, mask, keys, values, key, *shared):
        past = SegmentCache(1)
        past.keys[0], past.values[0] = keys, values
        out = block(x, mask, past, 0, key, *shared)
        return out, past.keys[0], past.values[0]

    def run(x, mask, cache, layer, key, *shared):
        past = (cache.keys[layer], cache.values[layer])
        # Dropout has keys of its own: the global random state need not be kept and restored.
        out, cache.keys[layer], cache.values[layer] = checkpoint(
            pure, x, mask, *past, key, *shared, use_reentrant=False, preserve_rng_state=False
        )
        return out

    return run
