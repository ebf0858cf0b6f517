"""GPT-2 (learned positions, pre-norm; as published: tied head, tanh GELU, scores over sqrt(d)).

Source: Radford et al. 2019; names follow transformers' GPT2LMHeadModel.
Departs from it: Linear weights are held (out, in); `sanitize` transposes Conv1D weights on reading,
`to_hf` transposes them back.
"""

from torch import Tensor, nn

from coconut.blocks import Tap, run_blocks
from coconut.checkpoints.model_args import GPT2Args as ModelArgs
from cuda_coconut.models.base import (
    ACTIVATIONS,
    Key,
    Mask,
    as_linear,
    attend,
    checkpointed,
    dropout,
    split_key,
)
from cuda_coconut.models.cache import Cache
from cuda_coconut.models.cpu import Linear

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
"""Weights that Hugging Face stores (in, out)."""
VOCABULARY_ROWS = ("wte.weight", "lm_head.weight")
"""Tensors with a row a token, by their Hugging Face names; a tied head has none of its own."""


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.n_head = args.n_head
        self.query_factor = args.query_factor(layer)
        self.attn_pdrop, self.resid_pdrop = args.attn_pdrop, args.resid_pdrop
        self.c_attn = Linear(args.n_embd, 3 * args.n_embd)
        self.c_proj = Linear(args.n_embd, args.n_embd)

    def forward(
        self, x: Tensor, mask: Mask, cache: Cache | None, layer: int, key: Key = None
    ) -> Tensor:
        """Every token reads those before it: x (B, T, D) -> (B, T, D)."""
        B, T, D = x.shape
        attn_key, resid_key = split_key(key, 2)
        q, k, v = (
            part.view(B, T, self.n_head, -1).transpose(1, 2)
            for part in self.c_attn(x).chunk(3, dim=-1)
        )
        if self.query_factor != 1:
            q = q * self.query_factor
        keys, values = ([k], [v]) if cache is None else cache.update(layer, k, v)
        out = attend(q, keys, values, mask, self.attn_pdrop, attn_key)
        out = self.c_proj(out.transpose(1, 2).reshape(B, T, D))
        return dropout(out, self.resid_pdrop, resid_key)


class MLP(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.resid_pdrop = args.resid_pdrop
        self.activation = ACTIVATIONS[args.activation_function]
        self.c_fc = Linear(args.n_embd, args.inner)
        self.c_proj = Linear(args.inner, args.n_embd)

    def forward(self, x: Tensor, key: Key = None) -> Tensor:
        """Each token by itself: x (B, T, D) -> (B, T, D)."""
        inner = self.c_proj(self.activation(self.c_fc(x)))
        return dropout(inner, self.resid_pdrop, key)


class Block(nn.Module):
    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(args.n_embd, eps=args.layer_norm_epsilon)
        self.attn = Attention(args, layer)
        self.ln_2 = nn.LayerNorm(args.n_embd, eps=args.layer_norm_epsilon)
        self.mlp = MLP(args)

    def forward(
        self, x: Tensor, mask: Mask, cache: Cache | None, layer: int, key: Key = None
    ) -> Tensor:
        """Attention, then the MLP, each added to the residual stream: x (B, T, D) -> (B, T, D)."""
        attn_key, mlp_key = split_key(key, 2)
        x = x + self.attn(self.ln_1(x), mask, cache, layer, attn_key)
        return x + self.mlp(self.ln_2(x), mlp_key)


class Model(nn.Module):
    """GPT-2 in the three verbs that latent passes need."""

    shares_prompts = True
    """Whether attention reads the keys of a prompt that several rows go on from; see `Shared`."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.norm_kind = "layer"
        self.feedback = None  # ĥ itself; feedback.py puts other rules here
        self.wte = nn.Embedding(args.vocab_size, args.n_embd)
        self.wpe = nn.Embedding(args.n_positions, args.n_embd)
        self.h = nn.ModuleList(Block(args, i) for i in range(args.n_layer))
        self.ln_f = nn.LayerNorm(args.n_embd, eps=args.layer_norm_epsilon)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.n_embd, args.vocab_size, bias=False)

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings without positions, which thoughts replace: ids (B, T) -> (B, T, D)."""
        return self.wte(ids)

    def trunk(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Mask = None,
        cache: Cache | None = None,
        key: Key = None,
        checkpointing: bool = False,
        tap: Tap | None = None,
    ) -> Tensor:
        """Blocks and final norm: x (B, T, D), positions (B, T) -> (B, T, D).

        key: turns dropout on, on the embeddings of thoughts too. mask: see `additive_mask`.
        checkpointing: recompute each block in the backward pass. tap: is shown the states between.
        """
        keys = split_key(key, len(self.h) + 1)
        x = dropout(x + self.wpe(positions), self.args.embd_pdrop, keys[0])
        blocks = map(checkpointed, self.h) if checkpointing else self.h
        return self.ln_f(run_blocks(blocks, x, mask, cache, keys[1:], tap=tap))

    def head(self, h: Tensor) -> Tensor:
        """Logits of states after the final norm: (..., D) -> (..., V)."""
        tied = self.args.tie_word_embeddings
        return as_linear(self.wte, h) if tied else self.lm_head(h)

    def final_norm(self, h: Tensor) -> Tensor:
        """The norm between the last block and the head, on states (..., D) of any layer."""
        return self.ln_f(h)

    def position_embedding(self, positions: Tensor) -> Tensor | None:
        """What `trunk` adds to the inputs at these positions (B,): (B, D)."""
        return self.wpe(positions)

    @property
    def embedding(self) -> Tensor:
        """Input embeddings (V, D)."""
        return self.wte.weight

    @property
    def unembedding(self) -> Tensor:
        """Weights of the head (V, D)."""
        return self.wte.weight if self.args.tie_word_embeddings else self.lm_head.weight

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks."""
        return self.h


def sanitize(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face names and layout -> ours; applied twice equals applied once.

    Prefixes (mlx_lm's too) are dropped. The orientation is read from c_attn once and holds for the
    whole file: the square c_proj does not show its own.
    """
    out = {n.removeprefix("model.").removeprefix("transformer."): w for n, w in weights.items()}
    c_attn = out.get("h.0.attn.c_attn.weight")
    if c_attn is not None and c_attn.ndim == 2 and c_attn.shape[0] < c_attn.shape[1]:
        out = {name: w.T if name.endswith(CONV1D) else w for name, w in out.items()}
    return out


def to_hf(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names and layout -> the hub's GPT-2 file: no prefix, Conv1D (in, out)."""
    return {name: w.T if name.endswith(CONV1D) else w for name, w in weights.items()}
