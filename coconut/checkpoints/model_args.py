"""The fields of config.json: what the hand-written architectures are built from, with limits, and
what else is known, of every model that is read. docs/what_is_read.md shows these tables.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

Shapes = dict[str, tuple[int, ...]]
"""Name in a file of the hub -> shape."""
HEAD = "lm_head.weight"
ACTIVATIONS = (
    *("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"),
    *("gelu", "gelu_python", "gelu_10", "quick_gelu", "relu", "relu2", "relu6", "leaky_relu"),
    *("silu", "swish", "mish", "hardswish", "tanh", "sigmoid", "laplace", "linear"),
)
"""transformers' names of functions without weights; both twins have each (models/base.py)."""


class Limit(NamedTuple):
    """What a field may hold: in words, and whether a value of config.json is so."""

    words: str
    allows: Callable[[Any], bool]


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda v: type(v) in (int, float) and low <= v < high  # False for NaN


Count = Annotated[int, Limit("a whole number above 0", lambda v: type(v) is int and 0 < v < 2**31)]
# Above these it is a slip or an attack: no model has as many.
Size = Annotated[Count, Limit("less than 2**24", lambda v: v < 2**24)]
Layers = Annotated[Count, Limit("at most 10,000 layers", lambda v: v <= 10_000)]
Rate = Annotated[float, Limit("a number from 0 to below 1", _number(0, 1))]
Spread = Annotated[float, Limit("a number from 0", _number(0, math.inf))]
Positive = Annotated[float, Limit("a number above 0", _number(1e-30, math.inf))]
Flag = Annotated[bool, Limit("true or false", lambda v: type(v) is bool)]
Activation = Annotated[str, Limit(f"one of {', '.join(ACTIVATIONS)}", ACTIVATIONS.__contains__)]
Start = Annotated[str, Limit("sinusoid", lambda v: v == "sinusoid")]


@dataclass
class GPT2Args:
    """The fields of config.json that GPT-2 is built from, under their Hugging Face names."""

    vocab_size: Size
    n_positions: Size
    n_embd: Size
    n_layer: Layers
    n_head: Size
    n_inner: Size | None = None
    activation_function: Activation = "gelu_new"
    layer_norm_epsilon: Rate = 1e-5
    scale_attn_weights: Flag = True
    scale_attn_by_inverse_layer_idx: Flag = False
    tie_word_embeddings: Flag = True
    embd_pdrop: Rate = 0.1
    attn_pdrop: Rate = 0.1
    resid_pdrop: Rate = 0.1
    initializer_range: Spread = 0.02
    position_initializer: Start | None = None
    """A field of ours: how positions start where nothing is read."""

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(f"width {self.n_embd} cannot be divided among {self.n_head} heads")

    @property
    def n_layers(self) -> int:
        """Blocks."""
        return self.n_layer

    @property
    def inner(self) -> int:
        """Width inside the MLP."""
        return self.n_inner or 4 * self.n_embd

    def query_factor(self, layer: int) -> float:
        """What queries are multiplied by beside the usual 1 / sqrt(head size): 1 as published."""
        factor = 1.0 if self.scale_attn_weights else math.sqrt(self.n_embd // self.n_head)
        return factor / (layer + 1) if self.scale_attn_by_inverse_layer_idx else factor

    def shapes(self) -> Shapes:
        """Every tensor of a file of the hub, which holds Linear weights (in, out)."""
        D, inner = self.n_embd, self.inner
        shapes: Shapes = {"wte.weight": (self.vocab_size, D), "wpe.weight": (self.n_positions, D)}
        for i in range(self.n_layer):
            for name, shape in (
                ("ln_1", (D,)),
                ("attn.c_attn", (D, 3 * D)),
                ("attn.c_proj", (D, D)),
                ("ln_2", (D,)),
                ("mlp.c_fc", (D, inner)),
                ("mlp.c_proj", (inner, D)),
            ):
                shapes[f"h.{i}.{name}.weight"] = shape
                shapes[f"h.{i}.{name}.bias"] = shape[-1:]
        head: Shapes = {} if self.tie_word_embeddings else {HEAD: (self.vocab_size, D)}
        return shapes | {"ln_f.weight": (D,), "ln_f.bias": (D,)} | head


_GPT2: dict[str, Any] = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
PUBLISHED_SHAPES = {
    "gpt2": _GPT2 | {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": _GPT2 | {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": _GPT2 | {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": _GPT2 | {"n_embd": 1600, "n_layer": 48, "n_head": 25},
    "distilbert/distilgpt2": _GPT2 | {"n_embd": 768, "n_layer": 6, "n_head": 12},
}
"""config.json of the published GPT-2s; OpenAI's hub names may carry `openai-community/`."""


@dataclass
class Qwen2Args:
    """The fields of config.json that Qwen2 is built from, under their Hugging Face names."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    max_position_embeddings: Count = 32768
    hidden_act: str = "silu"
    rms_norm_eps: Rate = 1e-6
    rope_theta: Positive = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    """The newer spelling; its rope_theta counts before the field of that name."""
    use_sliding_window: Flag = False
    layer_types: list[str] | None = None
    tie_word_embeddings: Flag = False
    attention_dropout: Rate = 0.0
    initializer_range: Spread = 0.02

    def __post_init__(self) -> None:
        if self.hidden_act not in ("silu", "swish"):
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported, only silu")
        if self.use_sliding_window or set(self.layer_types or ()) - {"full_attention"}:
            raise ValueError("sliding-window attention is not supported; every layer must be full")
        if self.rope_scaling and self.rope_parameters not in (None, {}, self.rope_scaling):
            raise ValueError("rope_scaling and rope_parameters differ: remove one")
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
            if odd := set(rope) - {"rope_type", "type", "rope_theta"}:
                raise ValueError(f"{name}: {min(odd)} is not known here")
            self.rope_theta = rope.get("rope_theta", self.rope_theta)
        if not _number(1e-30, math.inf)(self.rope_theta):
            raise ValueError(f"rope_theta: expected a number above 0, got {self.rope_theta!r}")
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
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim}: rotary positions turn pairs")

    @property
    def n_layers(self) -> int:
        """Blocks."""
        return self.num_hidden_layers

    def shapes(self) -> Shapes:
        """Every tensor of a file of the hub."""
        assert self.head_dim and self.num_key_value_heads, "set when this was made"
        V, D, inner = self.vocab_size, self.hidden_size, self.intermediate_size
        own, shared = (
            n * self.head_dim for n in (self.num_attention_heads, self.num_key_value_heads)
        )
        shapes: Shapes = {"model.embed_tokens.weight": (V, D)}
        for i in range(self.num_hidden_layers):
            layer = f"model.layers.{i}."
            shapes[layer + "input_layernorm.weight"] = (D,)
            for name, n in (("q", own), ("k", shared), ("v", shared)):
                shapes[f"{layer}self_attn.{name}_proj.weight"] = (n, D)
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (n,)
            shapes[layer + "self_attn.o_proj.weight"] = (D, own)
            shapes[layer + "post_attention_layernorm.weight"] = (D,)
            shapes[layer + "mlp.gate_proj.weight"] = (inner, D)
            shapes[layer + "mlp.up_proj.weight"] = (inner, D)
            shapes[layer + "mlp.down_proj.weight"] = (D, inner)
        head: Shapes = {} if self.tie_word_embeddings else {HEAD: (V, D)}
        return shapes | {"model.norm.weight": (D,)} | head


FORK_IDS = ("bot_id", "eot_id", "latent_token_id")
"""Ids of start, end and latent in the fork's config.json."""
WITHOUT_EFFECT = {
    "names, versions, types of numbers": """
        _name_or_path name_or_path model_name architectures model_type torch_dtype dtype prefix
        use_bfloat16 transformers_version unsloth_version unsloth_fixed tokenizer_class _commit_hash
        torchscript tf_legacy_loss output_past keys_to_ignore_at_inference attn_implementation
        _attn_implementation _attn_implementation_autoset""",
    "tokens, which the tokenizer names": """
        bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
        forced_bos_token_id forced_eos_token_id""",
    "how transformers generates": """
        use_cache cache_implementation is_decoder max_length min_length do_sample early_stopping
        num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
        repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
        bad_words_ids num_return_sequences remove_invalid_values exponential_decay_length_penalty
        suppress_tokens begin_suppress_tokens task_specific_params""",
    "what transformers returns": """
        output_attentions output_hidden_states output_scores return_dict return_dict_in_generate""",
    "heads for other tasks, and training": """
        finetuning_task id2label label2id num_labels _num_labels problem_type gradient_checkpointing
        chunk_size_feed_forward summary_type summary_use_proj summary_activation
        summary_first_dropout summary_proj_to_labels""",
    "read by convert": f"{' '.join(FORK_IDS)} replacement_method",
}
"""Fields of any config.json that change no logit, by what they are for."""
_NOTHING = Limit("nothing, since it is not computed here", lambda v: not v)
_QUANTIZED = Limit(
    "mlx_lm's settings: bits (2 to 6, 8) and group_size (16, 32, 64, 128)",
    lambda v: (
        not v
        or (
            (isinstance(v, dict) and "quant_method" not in v)
            and (v.get("bits") in (2, 3, 4, 5, 6, 8) and v.get("group_size") in (16, 32, 64, 128))
        )
    ),
)
_NEVER = """add_cross_attention cross_attention_hidden_size is_encoder_decoder tie_encoder_decoder
    pruned_heads per_layer_config n_special"""
KNOWN: dict[str, Limit | None] = dict.fromkeys(_NEVER.split(), _NOTHING)
"""Further fields of any config.json, and what they must hold if not anything."""
OF_TYPE: dict[str, dict[str, Limit | None]] = {
    # Upcasting: float32 is the same either way, and our softmax is always float32.
    "gpt2": dict.fromkeys(("n_ctx", "predict_special_tokens", "reorder_and_upcast_attn"))
    | dict.fromkeys(("quantization", "quantization_config"), _QUANTIZED),
    # Windows: of no effect while use_sliding_window is false, which it must be.
    "qwen2": dict.fromkeys(("sliding_window", "max_window_layers"))
    | dict.fromkeys(("quantization", "quantization_config"), _QUANTIZED)
    | {"attention_bias": Limit("true", lambda v: v is True), "mlp_bias": _NOTHING},
}
"""Further ones of a hand-written model."""
SIZES = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    max_position_embeddings""".split()
BORROWED: dict[str, Any] = {
    **dict.fromkeys(SIZES, Size),
    **{"num_hidden_layers": Layers, "max_position_embeddings": Count},
    **dict.fromkeys(("num_key_value_heads", "head_dim", "sliding_window"), Size | None),
    **dict.fromkeys(("rms_norm_eps", "attention_dropout"), Rate),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), Flag),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), Positive),
    "initializer_range": Spread,
    # Judged in architectures.py; auto_map names code that is never run, the library's own is.
    **dict.fromkeys("rope_scaling rope_parameters layer_types hidden_act auto_map".split()),
    **dict.fromkeys("use_sliding_window max_window_layers".split()),
}
"""Fields of every borrowed model."""
_GEMMA = """attn_logit_softcapping final_logit_softcapping query_pre_attn_scalar hidden_activation
    use_bidirectional_attention"""
BORROWED_OF_TYPE = {
    "llama": "pretraining_tp",
    "gemma2": f"{_GEMMA} sliding_window_size",
    "gemma3_text": f"{_GEMMA} sliding_window_pattern _sliding_window_pattern",
    "phi3": "original_max_position_embeddings partial_rotary_factor embd_pdrop resid_pdrop",
    "smollm3": "no_rope_layers no_rope_layer_interval pretraining_tp",
    "granite": "attention_multiplier embedding_multiplier logits_scaling residual_multiplier",
}
"""Further ones of the borrowed models that are held to tests."""
