"""transformers' models: built from a config.json, looked over, and made ready to be borrowed."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from coconut.blocks import first_line
from coconut.checkpoints.architectures import BF16_SCALE
from coconut.checkpoints.verdict import check_borrowed
from coconut.errors import UserError
from cuda_coconut.models.borrowed import Borrowed
from cuda_coconut.models.stand_ins import (
    ATTENTION,
    CACHE_NAMES,
    Slot,
    TiedHead,
    accepted,
    attention,
    cache_name,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Naming:
    """Names of a borrowed model's tensors: those of Hugging Face, which its library keeps."""

    VOCABULARY_ROWS = (EMBEDDING, HEAD)
    """Tensors with a row a token; a tied head has none of its own."""

    def sanitize(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Hugging Face names -> ours; applied twice equals applied once."""
        return dict(weights)

    def to_hf(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Our names -> Hugging Face names: the same."""
        return weights


def build(config: dict[str, Any], where: str) -> tuple[Any, Any]:
    """(model, its names) for the config.json of an architecture that is not hand-written.

    Raises UserError if transformers does not have it, or if it cannot be taken apart.
    """
    model_type = config["model_type"]
    try:
        import transformers
        from transformers.initialization import no_init_weights
    except ImportError:
        raise UserError(
            where,
            f"model_type {model_type!r} is not hand-written here (gpt2, qwen2), and the torch twin"
            " borrows others from transformers: pip install 'transformers>=5.0'",
        ) from None
    if model_type not in transformers.CONFIG_MAPPING:
        raise UserError(
            where,
            f"model_type {model_type!r} is neither hand-written here (gpt2, qwen2) nor one of"
            f" transformers {transformers.__version__}",
        )
    transformers.AttentionInterface.register(ATTENTION, attention)
    try:
        check_borrowed(config, transformers.CONFIG_MAPPING[model_type]().to_dict(), where)
        fields = {n: v for n, v in config.items() if n not in ("model_type", "auto_map")}
        if fields.get("rope_parameters"):  # says it all; the other spellings are mlx_lm's
            for name in ("rope_theta", "rope_scaling", "rope_local_base_freq"):
                fields.pop(name, None)
        # Of no use here, and refused where they do not fit a small vocabulary.
        fields |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        described = transformers.AutoConfig.for_model(model_type, **fields)
        # Not on the meta device: the rotary frequencies are no weights, and no file has them.
        with no_init_weights():
            model = transformers.AutoModelForCausalLM.from_config(
                described, dtype=torch.float32, attn_implementation=ATTENTION
            )
        model.eval()
        model.__class__ = type("Model", (Borrowed, type(model)), {"model_type": model_type})
        model.feedback = None  # ĥ itself; feedback.py puts other rules here
        problem = _problem(model, config["tie_word_embeddings"])
        problem = problem or _prepare(model)
    except UserError:
        raise
    # Whatever a wrong field makes the library stumble over.
    except Exception as error:
        raise UserError(
            where,
            f"not a {model_type} configuration that transformers can use: {first_line(error)}",
        ) from None
    if problem:
        raise UserError(where, f"model_type {model_type!r}: {problem}; not supported")
    return model, Naming()


def _problem(model, tied: bool) -> str | None:
    """What of a model's build the verbs cannot deal with."""
    inner = getattr(model, "model", None)
    if not all(hasattr(inner, name) for name in ("embed_tokens", "layers", "norm")):
        return "its blocks are not where Llama keeps them (model.embed_tokens, layers, norm)"
    if set(dict(model.named_children())) - {"model", "lm_head", "feedback"}:
        return "it has parts besides its blocks and its head"
    if tied != model.config.tie_word_embeddings:
        return f"transformers does not build it with tie_word_embeddings {tied}"
    if model.lm_head.bias is not None:
        return "its head has a bias"
    names = [n for n, _ in inner.named_parameters()]
    stray = [n for n in names if n.split(".")[0] not in ("embed_tokens", "layers", "norm")]
    if stray:
        return f"it has weights of its own beside its blocks ({stray[0]})"
    odd = [n for n, w in inner.layers[0].named_parameters() if w.ndim > 2]
    if odd:
        return f"a block holds experts or convolutions ({odd[0]})"
    if "attention_mask" not in accepted(inner.layers[0]):
        return "its blocks take no attention_mask"
    return None if cache_name(inner.layers[0]) else f"its blocks take no {' or '.join(CACHE_NAMES)}"


def _prepare(model) -> str | None:
    """Put stand-ins in their places, find the factor of the embeddings; what is odd about them."""
    inner, described = model.model, model.config
    for layer, block in enumerate(inner.layers):
        block.forward = Slot(block, layer)
    kinds = getattr(described, "layer_types", None) or []
    window = getattr(described, "sliding_window", None)
    model.has_window = window is not None and (not kinds or "sliding_attention" in kinds)
    table = inner.embed_tokens
    factor = _factors(model, table)
    if factor is None:
        return "its embeddings pass through more than a factor before the first block"
    model.scale_of_table, model.scale = factor
    if described.model_type in BF16_SCALE:
        # As mlx_lm, and as in training: float32's sqrt(D) would be another model by 0.2 %.
        rounded = float(torch.tensor(model.scale).to(torch.bfloat16))
        model.scale_of_table = model.scale = rounded
    # A plain table: a layer that multiplies would be in the way of trained rows, and one that knows
    # a padding token would give that row no gradient, though it may be eos.
    inner.embed_tokens = nn.Embedding(*table.weight.shape, _weight=table.weight)
    if described.tie_word_embeddings:
        model.lm_head = TiedHead(model)
    buffers = set(model.state_dict()) - {n for n, _ in model.named_parameters()}
    return f"it keeps {min(buffers)} beside its weights" if buffers else None


@torch.no_grad()
def _factors(model, table: nn.Module) -> tuple[float, float] | None:
    """What the embedding layer multiplies by, and what reaches the first block by; None if more."""
    probe = torch.randn(2, table.weight.shape[1], generator=torch.Generator().manual_seed(0))
    probe[0] = 1
    ids, seen = torch.tensor([[0, 1]]), []

    def run(slot: Slot, h: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        if slot.layer == 0:
            seen.append(h)
        return h

    table.__dict__["weight"] = probe  # found before the parameter of that name
    try:
        seen.append(table(ids))
        with model.stand_ins(run):
            model.model(input_ids=ids, use_cache=False)
    finally:
        del table.__dict__["weight"]
    factors = [h[0, 0, 0].item() for h in seen]
    plain = F.embedding(ids, probe)
    same = [
        torch.allclose(h, plain * c, rtol=1e-5, atol=0) for h, c in zip(seen, factors, strict=True)
    ]
    return (factors[0], factors[1]) if all(same) else None
