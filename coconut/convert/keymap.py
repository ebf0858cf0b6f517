"""Names and shapes of each architecture's tensors: one table an architecture, both directions.

The hub's names are the middle: a foreign key is stripped down to one (`hub_name`), and an official
key is made from one (`official_name`).

    base_causallm.transformer.h.0.ln_1.weight  <->  h.0.ln_1.weight                          GPT-2
    base_causallm.model.layers.0.mlp.up_proj.weight  <->  model.layers.0.mlp.up_proj.weight  Qwen2
    embedding.weight, lm_head.weight (tied)     ->  copies of the embedding
"""

import importlib
import importlib.util
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from coconut.checkpoints.architectures import check_architecture
from coconut.errors import UserError

TWINS = {"torch": "cuda_coconut", "mlx": "mlx_coconut"}
"""Framework -> the twin that is written in it."""
Shape = tuple[int, ...]

COCONUT_PREFIX = "base_causallm."
"""What the published wrapper puts before every tensor of the model it wraps."""
WRAPPER_COPY = "embedding.weight"
"""The wrapper's second name for the input embedding."""
HEAD = "lm_head.weight"

# Added by distributed data parallelism, torch.compile, FSDP and activation checkpointing.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_HIGHEST = 2**31


@dataclass(frozen=True)
class Architecture:
    """How one architecture's tensors are called and shaped in a file of the hub.

    body: what the causal model of transformers puts before the hub's names, head excepted.
    turned: endings of the weights that Conv1D holds (in, out) and a Linear layer (out, in).
    buffers: constants that some files hold beside the weights.
    """

    model_type: str
    class_name: str
    body: str
    embedding: str
    turned: tuple[str, ...]
    buffers: re.Pattern[str]
    layer: re.Pattern[str]
    shapes: Callable[[Mapping[str, Any], str], dict[str, Shape]]

    def hub_name(self, name: str) -> str:
        """Hub name of a key in any known layout; `embedding.weight` stays as it is."""
        name = name.removeprefix(COCONUT_PREFIX)
        return name.removeprefix(self.body) if self.body else name

    def official_name(self, name: str, is_coconut: bool) -> str:
        """Key of a hub name in the published state dict."""
        prefix = COCONUT_PREFIX if is_coconut else ""
        return prefix + (name if name == HEAD else self.body + name)

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the head is the input embedding: always in GPT-2, by the config in Qwen2."""
        return HEAD not in self.shapes(config, "config.json")

    def n_layers(self, names: Collection[str]) -> int:
        """One more than the highest number of a layer among hub names."""
        return max((int(m[1]) + 1 for m in map(self.layer.match, names) if m), default=0)


def strip_wrappers(name: str) -> str:
    """The key without what distributed training and compilation put into it, anywhere."""
    return _WRAPPERS.sub("", name)


def architecture(config: Mapping[str, Any], where: str) -> Architecture:
    """The table of a config's model_type. Raises UserError if such a model is not supported."""
    check_architecture(config, where)
    found = ARCHITECTURES.get(config["model_type"])
    if found is not None:
        return found
    # Borrowed models are called as in the hub, by us and by their libraries.
    return replace(QWEN2, model_type=config["model_type"], shapes=_borrowed_shapes)


def _borrowed_shapes(config: Mapping[str, Any], where: str) -> dict[str, Shape]:
    """What the library that a twin borrows the model from builds."""
    twin = next((t for t in reversed(TWINS) if importlib.util.find_spec(t)), None)
    if twin is None:
        raise UserError(where, "needs mlx or torch to know this model: pip install one of them")
    models, weights = (
        importlib.import_module(f"{TWINS[twin]}.{n}") for n in ("models", "models.weights")
    )
    model, module = models.build(dict(config), where)
    return {n: tuple(w.shape) for n, w in weights.hf_weights(model, module).items()}


def gpt2_config(shapes: Mapping[str, Shape], where: str) -> tuple[dict[str, Any], list[str]]:
    """(config.json, what was inferred) of a bare GPT-2 state dict.

    shapes: by hub name. Heads leave no trace in shapes: 64 wide as in every published GPT-2.
    Raises UserError where shapes do not say.
    """
    try:
        (rows, width), (n_positions, _) = shapes["wte.weight"], shapes["wpe.weight"]
        (inner,) = shapes["h.0.mlp.c_fc.bias"]
    except (KeyError, ValueError):
        raise UserError(
            where,
            "wte.weight, wpe.weight and h.0.mlp.c_fc.bias do not have the shapes of a GPT-2;"
            " if it is one, give its config.json with --config",
        ) from None
    if width % 64 or not width:
        raise UserError(
            where, f"width {width} is not made of heads of 64; give the config.json with --config"
        )
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": rows,
        "n_positions": n_positions,
        "n_embd": width,
        "n_layer": GPT2.n_layers(shapes),
        "n_head": width // 64,
        "n_inner": None if inner == 4 * width else inner,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
    }
    inferred = [f"{n} {config[n]}" for n in ("n_layer", "n_embd", "n_positions", "vocab_size")]
    inferred.append(f"n_head {config['n_head']} (width / 64)")
    return config, inferred


def _gpt2_shapes(config: Mapping[str, Any], where: str) -> dict[str, Shape]:
    V, P, D, L, H = _numbers(
        config, where, "vocab_size", "n_positions", "n_embd", "n_layer", "n_head"
    )
    inner = 4 * D if config.get("n_inner") is None else _numbers(config, where, "n_inner")[0]
    if D % H:
        raise UserError(where, f"n_embd {D} is not a multiple of n_head {H}")
    if config.get("tie_word_embeddings", True) is not True:
        raise UserError(where, "tie_word_embeddings: a GPT-2 with a head of its own is not known")
    shapes: dict[str, Shape] = {"wte.weight": (V, D), "wpe.weight": (P, D)}
    for i in range(L):
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
    return shapes | {"ln_f.weight": (D,), "ln_f.bias": (D,)}


def _qwen2_shapes(config: Mapping[str, Any], where: str) -> dict[str, Shape]:
    V, D, inner, L, H = _numbers(
        config,
        where,
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    # The defaults of transformers' Qwen2Config: as many key heads as heads, and no tied head.
    G, head = H, D // H
    if config.get("num_key_value_heads") is not None:
        (G,) = _numbers(config, where, "num_key_value_heads")
    if config.get("head_dim") is not None:
        (head,) = _numbers(config, where, "head_dim")
    if H % G or (config.get("head_dim") is None and D % H):
        raise UserError(where, f"{H} heads do not divide into {G} key heads, or {D} into {H}")
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (V, D)}
    for i in range(L):
        layer = f"model.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (D,)
        for name, n in (("q", H), ("k", G), ("v", G)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (n * head, D)
            shapes[f"{layer}self_attn.{name}_proj.bias"] = (n * head,)
        shapes[layer + "self_attn.o_proj.weight"] = (D, H * head)
        shapes[layer + "post_attention_layernorm.weight"] = (D,)
        shapes[layer + "mlp.gate_proj.weight"] = (inner, D)
        shapes[layer + "mlp.up_proj.weight"] = (inner, D)
        shapes[layer + "mlp.down_proj.weight"] = (D, inner)
    shapes["model.norm.weight"] = (D,)
    if config.get("tie_word_embeddings", False) is not True:
        shapes[HEAD] = (V, D)
    return shapes


def _numbers(config: Mapping[str, Any], where: str, *names: str) -> list[int]:
    """Positive whole numbers of a config. Raises UserError listing what is not one."""
    problems = [
        f"{name}: expected a positive whole number, got {str(config.get(name))[:40]}"
        for name in names
        if type(config.get(name)) is not int or not 0 < config[name] < _HIGHEST
    ]
    if problems:
        raise UserError(where, *problems)
    return [config[name] for name in names]


GPT2 = Architecture(
    model_type="gpt2",
    class_name="GPT2LMHeadModel",
    body="transformer.",
    embedding="wte.weight",
    turned=("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"),
    # The causal mask, which old versions of transformers saved, and the MLX port trained.
    buffers=re.compile(r"h\.\d{1,9}\.attn\.(?:bias|masked_bias)", re.ASCII),
    layer=re.compile(r"h\.(\d{1,9})\.", re.ASCII),
    shapes=_gpt2_shapes,
)
QWEN2 = Architecture(
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    body="",
    embedding="model.embed_tokens.weight",
    turned=(),
    buffers=re.compile(r"model\.(?:layers\.\d{1,9}\.self_attn\.)?rotary_emb\.inv_freq", re.ASCII),
    layer=re.compile(r"model\.layers\.(\d{1,9})\.", re.ASCII),
    shapes=_qwen2_shapes,
)
ARCHITECTURES = {a.model_type: a for a in (GPT2, QWEN2)}
