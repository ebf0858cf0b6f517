"""What the hand-written architectures are built from: their fields of config.json."""

from dataclasses import dataclass
from typing import Any


@dataclass
class GPT2Args:
    """The fields of config.json that GPT-2 is built from, under their Hugging Face names."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int | None = None
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    initializer_range: float = 0.02


@dataclass
class Qwen2Args:
    """The fields of config.json that Qwen2 is built from, under their Hugging Face names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    """The newer spelling; its rope_theta counts before the field of that name."""
    use_sliding_window: bool = False
    layer_types: list[str] | None = None
    tie_word_embeddings: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported, only silu")
        if self.use_sliding_window or set(self.layer_types or ()) - {"full_attention"}:
            raise ValueError("sliding-window attention is not supported; every layer must be full")
        for name in ("rope_scaling", "rope_parameters"):
            rope = getattr(self, name) or {}
            if not isinstance(rope, dict):
                raise ValueError(f"{name}: expected an object or null")
            kind = rope.get("rope_type", rope.get("type", "default"))
            if kind != "default":
                raise ValueError(
                    f"{name}: rotary positions of type {kind!r} are not supported; up to the"
                    " length that the model was trained with it works without them: remove the type"
                )
            self.rope_theta = rope.get("rope_theta", self.rope_theta)
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} heads cannot share {self.num_key_value_heads} keys"
            )
        if not self.head_dim:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads}"
                    " heads"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
