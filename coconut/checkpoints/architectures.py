"""Which models can be opened: the hand-written ones, and others through mlx_lm or transformers.

    gpt2, qwen2     mlx_coconut/models/ and cuda_coconut/models/ have a file each
    other causal    mlx_lm's or transformers' own code, through borrowed.py in both; what is refused
    models          says why here or, once it is built, there

Only config.json is looked at here, before anything large is fetched or built.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from coconut.checkpoints.model_args import HEAD, GPT2Args, Qwen2Args
from coconut.errors import UserError

HAND_WRITTEN: dict[str, type[GPT2Args] | type[Qwen2Args]] = {"gpt2": GPT2Args, "qwen2": Qwen2Args}
"""model_type -> what its file in both twins' models/ is built from."""
TRIED = (
    "llama",
    "mistral",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "smollm3",
    "granite",
)
"""Borrowed model types that the tests compare with their library's own forward."""
WINDOWED = ("gemma3_text",)
"""Borrowed model types whose sliding window both libraries keep to."""
BF16_SCALE = ("gemma3_text",)
"""Which mlx_lm multiplies embeddings by sqrt(D) rounded to bfloat16 for, as in their training."""
GEMMAS = ("gemma2", "gemma3_text")

_REFUSED = {
    "gemma": "mlx_lm computes its GELU exactly and transformers by tanh, so one"
    " checkpoint would be two models; take a Gemma 2 or 3",
    "gemma3": "it sees images too; take a text model (gemma3_text)",
}
_ROPES = ("default", "linear", "llama3", "yarn")
"""Kinds of scaled positions that the libraries compute alike."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_RECURRENT = (
    *("state_size", "ssm_cfg", "ssm_state_size", "mamba_d_state", "linear_num_value_heads"),
    *("layers_block_type", "hybrid_override_pattern", "conv_L_cache", "block_types"),
)
_OTHER_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
"""What transformers takes for GPT-2's own names."""
_LAYERS = ("full_attention", "sliding_attention")
_DROPOUT = re.compile(r"(dropout|_pdrop|dropout_prob)$")


def is_borrowed(config: Mapping[str, Any]) -> bool:
    """Whether a model is none of the hand-written ones."""
    return config.get("model_type") not in tuple(HAND_WRITTEN)  # may be anything, a list too


def check_architecture(config: Mapping[str, Any], where: str) -> None:
    """Raise UserError, in one line, for a config.json that neither twin can open."""
    if is_borrowed(config) and (problem := _problem(config)):
        model_type = config.get("model_type")
        raise UserError(where, f"model_type {model_type!r} is not supported{problem}")


_SUPPORTED = (
    f"; there are {', '.join(HAND_WRITTEN)}, {', '.join(TRIED)} and causal models built like them"
    " (docs/models.md)"
)


def _problem(config: Mapping[str, Any]) -> str | None:
    """Why a model that is not hand-written cannot be borrowed: the end of a sentence."""
    model_type, classes = config.get("model_type"), config.get("architectures")
    if not isinstance(model_type, str) or not re.fullmatch(r"[A-Za-z]\w*", model_type):
        return _SUPPORTED
    if model_type in _REFUSED:
        return f": {_REFUSED[model_type]}"
    if isinstance(classes, list):
        is_causal = any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in classes)
    else:
        is_causal = model_type in TRIED
    if not is_causal or config.get("is_encoder_decoder"):
        return _SUPPORTED
    if "vision_config" in config or "text_config" in config:
        return ": it sees images too; take the text model alone, if there is one"
    if "quantization" in config or "quantization_config" in config:
        return " quantised: only gpt2 and qwen2 are; take its float model"
    if any(type(n := config.get(name)) is int and n > 1 for name in _EXPERTS):
        return ": a mixture of experts, which its files name in another way; take a dense model"
    if any(config.get(name) for name in _RECURRENT):
        return (
            ": it has recurrent layers, whose state cannot leave out the padding of a batch; take"
            " a model of attention alone"
        )
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and (odd := {*map(str, kinds)} - set(_LAYERS)):
        return f": it has layers of type {', '.join(sorted(odd))}; only {', '.join(_LAYERS)}"
    drops = [n for n, v in config.items() if _DROPOUT.search(n) and type(v) is float and v > 0]
    if drops:
        return f" with dropout, only without: set {', '.join(drops)} to 0 in config.json"
    return _unlike(config)


def _unlike(config: Mapping[str, Any]) -> str | None:
    """What the two libraries would compute differently."""
    model_type = config["model_type"]
    is_gemma = model_type in GEMMAS
    activation = config.get("hidden_activation") or config.get("hidden_act")
    usual = ("gelu_pytorch_tanh",) if is_gemma else ("silu", "swish")
    if model_type in TRIED and activation is not None and activation not in usual:
        return f" with the activation {activation}, only with {usual[0]}"
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.get(name) or {}
        if not isinstance(rope, dict):
            return f": {name} is no object"
        parts = [part for part in rope.values() if isinstance(part, dict)] or [rope]
        for part in parts:
            kind = part.get("rope_type", part.get("type", "default"))
            if kind not in _ROPES:
                return (
                    f" with rotary positions of type {kind}, only {', '.join(_ROPES)}: the others"
                    " change with the length of a text, in each library in its own way"
                )
    if model_type == "gemma3_text":
        names = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention")
        if odd := [name for name in names if config.get(name)]:
            return f" with {odd[0]}, which mlx_lm ignores"
    return None


def resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what readers know by other spellings or defaults.

    Applied twice equals applied once. transformers 5 writes rope_parameters and layer_types, which
    most of mlx_lm ignores without a word. Raises ValueError for what cannot be spelled otherwise.
    """
    if config.get("model_type") == "gpt2":
        for name, own in _OTHER_NAMES.items():
            if name in config and config.get(own, config[name]) != config[name]:
                raise ValueError(f"{name} and {own} differ")
        return {_OTHER_NAMES.get(name, name): value for name, value in config.items()}
    out = dict(config)
    if not is_borrowed(config):
        return out
    # The default of each class in transformers; mlx_lm's Llama has the other one.
    out.setdefault("tie_word_embeddings", config["model_type"] in GEMMAS)
    if config["model_type"] in GEMMAS:
        out.setdefault("head_dim", 256)
    if out.get("num_key_value_heads") is None and "num_attention_heads" in out:
        out["num_key_value_heads"] = out["num_attention_heads"]
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and rope:
        nested = all(isinstance(part, dict) for part in rope.values())
        whole = rope.get("full_attention", {}) if nested else rope
        if "rope_theta" in whole:
            out["rope_theta"] = whole["rope_theta"]
        kind = whole.get("rope_type", "default")
        if kind != "default":
            out["rope_scaling"] = dict(whole) | {"type": kind}
        if "partial_rotary_factor" in whole:
            out["partial_rotary_factor"] = whole["partial_rotary_factor"]
        local = rope.get("sliding_attention", {}) if nested else {}
        if local.get("rope_type", "default") != "default":
            raise ValueError("rope_parameters: scaled positions in sliding layers")
        if "rope_theta" in local:
            out["rope_local_base_freq"] = local["rope_theta"]
    kinds = config.get("layer_types")
    if config["model_type"] == "gemma3_text" and isinstance(kinds, list):
        period = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
        expected = ["sliding_attention"] * (period - 1) + ["full_attention"]
        if not period or kinds != [expected[i % period] for i in range(len(kinds))]:
            raise ValueError("layer_types: expected a full layer after every few sliding ones")
        out["sliding_window_pattern"] = period
    return out


def n_positions(config: Mapping[str, Any]) -> int | None:
    """Positions a model can use: those it has, or its sliding window where not both twins keep it.

    Within the window sliding attention and full attention are the same.
    """
    found = config.get("n_positions", config.get("max_position_embeddings"))
    window = config.get("sliding_window")
    is_on = type(window) is int and config.get("use_sliding_window", True)
    if is_borrowed(config) and is_on and config.get("model_type") not in WINDOWED:
        assert type(window) is int
        return window if found is None else min(found, window)
    return found


COCONUT_PREFIX = "base_causallm."
"""What the published wrapper puts before every tensor of the model it wraps."""
WRAPPER_COPY = "embedding.weight"
"""The wrapper's second name for the input embedding."""
# Added by distributed data parallelism, torch.compile, FSDP and activation checkpointing.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


def strip_wrappers(name: str) -> str:
    """The key without what distributed training and compilation put into it, anywhere."""
    return _WRAPPERS.sub("", name)


@dataclass(frozen=True)
class Architecture:
    """How one architecture's tensors are called in a file of the hub.

    body: what the causal model of transformers puts before the hub's names, head excepted.
    turned: endings of the weights that Conv1D holds (in, out) and a Linear layer (out, in).
    buffers: constants that some files hold beside the weights.
    """

    model_type: str
    body: str
    embedding: str
    turned: tuple[str, ...]
    buffers: re.Pattern[str]
    layer: re.Pattern[str]

    def hub_name(self, name: str) -> str:
        """Hub name of a key in any known layout; `embedding.weight` stays as it is."""
        name = name.removeprefix(COCONUT_PREFIX)
        # `model.`: mlx_lm's, and of a class that holds the model under this name.
        return name.removeprefix("model.").removeprefix(self.body) if self.body else name

    def official_name(self, name: str, is_coconut: bool) -> str:
        """Key of a hub name in the published state dict."""
        prefix = COCONUT_PREFIX if is_coconut else ""
        return prefix + (name if name == HEAD else self.body + name)

    def n_layers(self, names: Collection[str]) -> int:
        """One more than the highest number of a layer among hub names."""
        return max((int(m[1]) + 1 for m in map(self.layer.match, names) if m), default=0)


GPT2 = Architecture(
    model_type="gpt2",
    body="transformer.",
    embedding="wte.weight",
    turned=("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"),
    # The causal mask, which old versions of transformers saved, and the MLX port trained.
    buffers=re.compile(r"h\.\d{1,9}\.attn\.(?:bias|masked_bias)", re.ASCII),
    layer=re.compile(r"h\.(\d{1,9})\.", re.ASCII),
)
QWEN2 = Architecture(
    model_type="qwen2",
    body="",
    embedding="model.embed_tokens.weight",
    turned=(),
    buffers=re.compile(r"model\.(?:layers\.\d{1,9}\.self_attn\.)?rotary_emb\.inv_freq", re.ASCII),
    layer=re.compile(r"model\.layers\.(\d{1,9})\.", re.ASCII),
)
ARCHITECTURES = {a.model_type: a for a in (GPT2, QWEN2)}


def architecture(model_type: str) -> Architecture:
    """How the tensors of a model are called; borrowed ones as in the hub, and like Qwen2's."""
    return ARCHITECTURES.get(model_type) or replace(QWEN2, model_type=model_type)
