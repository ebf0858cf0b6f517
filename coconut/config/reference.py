"""docs/keys.md and the keys of --help: every key of a run, in groups, with who reads it.

    python -m coconut.config.reference > docs/keys.md

Default, type, limits and help of a key stand in its dataclass; here stands only where it is listed
and who reads it. A new key joins the group of the key declared before it until it is put elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import Field, fields
from typing import Any

from coconut.config.keys import (
    DATASET_METHODS,
    METHODS,
    PUBLISHED_NAMES,
    WITH_FEEDBACK,
    WITH_LATENTS,
    RunConfig,
)
from coconut.config.latro_keys import PRESETS, UNUSED, LatroConfig
from coconut.config.lora_keys import Lora

CURRICULUM = tuple(method for method in METHODS if method not in DATASET_METHODS)
STAGED = ("coconut", "pause_as_thought", "no_thoughts")
"""Methods whose stage follows from the epoch."""

GROUPS: dict[str, tuple[str, ...]] = {
    "The run": ("project", "save_path", "name", "seed", "method", "only_eval", "resume", "debug"),
    "Model": (
        *("model_id", "model_revision", "model_config_path", "load_model_path", "tokenizer"),
        "bf16",
    ),
    "Data": ("train_path", "val_path", "generate"),
    "Stages and latents": (
        *("c_thought", "epochs_per_stage", "max_latent_stage", "pad_latent_to_max"),
        *("latent_growth", "uniform_prob", "stage_mixing", "stage", "n_latents"),
        *("feedback", "replace_feedback", "feedback_lr_multiplier"),
    ),
    "Of single methods": (
        *("icot_tokens_per_epoch", "icot_smoothing", "icot_remove_all_after", "recall_sentences"),
    ),
    "Updates": (
        *("num_epochs", "batch_size_training", "gradient_accumulation_steps", "lr", "lr_schedule"),
        *("warmup_updates", "weight_decay", "adam_beta2", "max_grad_norm", "reset_optimizer"),
        *("gradient_checkpointing", "shard", "pad_multiple", "lora"),
    ),
    "Evaluation": (
        *("eval_every", "eval_batch_size", "max_new_tokens", "temperature", "swap_test"),
    ),
    "Files and lines": (
        *("save_only_improve", "save_every", "keep_checkpoints", "log_every", "report", "wandb"),
    ),
    "Questions with rationales in words": (
        *("dataset_name", "test_path", "split", "validation_items", "split_seed"),
        *("chat_template", "prompt", "response_length", "stop_token", "stop_token_ids"),
        *("pad_token", "answer_rule", "maj_k", "maj_temperature", "test_at_end"),
    ),
    "Published switches": ("coconut", "cot", "no_thoughts", "no_cot"),
}
"""Heading -> its keys, in the order in which they are read."""

READ_BY: dict[str, tuple[str, ...]] = {
    "c_thought": WITH_LATENTS,
    "epochs_per_stage": STAGED,
    "max_latent_stage": (*WITH_LATENTS, "no_thoughts"),
    "pad_latent_to_max": WITH_LATENTS,
    "latent_growth": ("coconut", "pause_as_thought"),
    "uniform_prob": (*WITH_LATENTS, "no_thoughts"),
    "stage_mixing": (*WITH_LATENTS, "no_thoughts"),
    "stage": (*WITH_LATENTS, "no_thoughts"),
    "n_latents": WITH_LATENTS,
    "feedback": WITH_FEEDBACK,
    "replace_feedback": WITH_FEEDBACK,
    "feedback_lr_multiplier": WITH_FEEDBACK,
    "icot_tokens_per_epoch": ("icot",),
    "icot_smoothing": ("icot",),
    "icot_remove_all_after": ("icot",),
    "recall_sentences": ("recall",),
    "shard": CURRICULUM,
    "max_new_tokens": CURRICULUM,
    "swap_test": CURRICULUM,
    "generate": CURRICULUM,
    **dict.fromkeys(GROUPS["Questions with rationales in words"], DATASET_METHODS),
}
"""Key -> the methods that read it, where not all do; those in UNUSED are not read by latro."""

NAMED = {
    WITH_LATENTS: "with latents",
    (*WITH_LATENTS, "no_thoughts"): "with latents, `no_thoughts`",
    CURRICULUM: "all but data sets",
    DATASET_METHODS: "data sets",
}
"""Sets of methods that the page names in one word."""


def grouped() -> list[tuple[str, list[Field[Any]]]]:
    """Every key of RunConfig once, under its heading."""
    home = {name: heading for heading, names in GROUPS.items() for name in names}
    found: dict[str, list[Field[Any]]] = {heading: [] for heading in GROUPS}
    heading = next(iter(GROUPS))
    for f in fields(RunConfig):
        heading = home.get(f.name, heading)
        found[heading].append(f)
    for heading, keys in found.items():
        order = {name: i for i, name in enumerate(GROUPS[heading])}
        keys.sort(key=lambda f: order.get(f.name, len(order)))
    return list(found.items())


def readers(name: str) -> str:
    """The methods that read a key, as the page says it; empty if all do."""
    methods = READ_BY.get(name)
    if methods is not None:
        return NAMED.get(methods) or ", ".join(f"`{method}`" for method in methods)
    return "all but `latro`" if name in UNUSED else ""


def help_text() -> str:
    """The keys for --help, a line each, under their headings."""
    lines = []
    for heading, keys in grouped():
        lines += ["", f"{heading}:"]
        for f in keys:
            lines.append(f"  {f.name} ({_values(f)}; {_default(RunConfig(), f)}): {_help(f)}")
            if f.name == "lora":
                lines += [
                    f"  lora.{g.name} ({_values(g)}; {_default(Lora(), g)}): {_help(g)}"
                    for g in fields(Lora)
                ]
    return "\n".join(lines[1:])


def keys_markdown() -> str:
    """docs/keys.md: `python -m coconut.config.reference > docs/keys.md`; a test compares."""
    lines = [
        "# Keys of a run",
        "",
        "In a YAML file, or as `key=value` behind it on the command line (`generate.items=100` for"
        " keys inside a key). Made from `coconut/config/keys.py` and its neighbours by"
        " `python -m coconut.config.reference`.",
        "",
        "**Read by** says which methods read a key; nothing there means all. *With latents* are "
        + ", ".join(f"`{method}`" for method in WITH_LATENTS)
        + "; *data sets* are "
        + ", ".join(f"`{method}`" for method in DATASET_METHODS)
        + ". [methods.md](methods.md) explains them. A default of – means that nothing is set.",
    ]
    for heading, keys in grouped():
        lines += ["", f"## {heading}", "", *_table(keys, RunConfig())]
        if heading == "Updates":
            lines += ["", "Inside `lora`:", "", *_table(fields(Lora), Lora(), "lora.")]
    defaults, common = LatroConfig(), RunConfig()
    own = [f for f in fields(LatroConfig) if not hasattr(common, f.name)]
    changed = [
        f
        for f in fields(LatroConfig)
        if hasattr(common, f.name) and getattr(defaults, f.name) != getattr(common, f.name)
    ]
    lines += [
        "",
        "## Of `method: latro`",
        "",
        "LaTRO's published names of keys are taken as well: "
        + ", ".join(f"`{theirs}` ({ours})" for theirs, ours in PUBLISHED_NAMES.items())
        + ".",
        "",
        *_table(own, defaults),
        "",
        "`preset: released` sets "
        + ", ".join(f"`{k}: {v!r}`" for k, v in PRESETS["released"].items())
        + "; single keys override a preset.",
        "",
        "Keys from above with another default:",
        "",
        *_table(changed, defaults),
    ]
    return "\n".join(lines) + "\n"


def _table(keys: Sequence[Field[Any]], defaults: object, prefix: str = "") -> list[str]:
    with_readers = any(readers(f.name) for f in keys) and not prefix and type(defaults) is RunConfig
    heads = ["key", "values", "default", "meaning", *(["read by"] if with_readers else [])]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]
    for f in keys:
        default = _default(defaults, f)
        cells = [f"`{prefix}{f.name}`", _values(f), "–" if default == "None" else f"`{default}`"]
        cells += [_help(f), *([readers(f.name)] if with_readers else [])]
        lines.append("| " + " | ".join(cells).replace("  ", " ") + " |")
    return lines


def _values(f: Field[Any]) -> str:
    """What a key takes: its choices, or its type and least value."""
    if f.metadata["choices"]:
        return ", ".join(f.metadata["choices"])
    kind = str(f.type).split(" | ")[0].split("[")[0]
    low = f.metadata["low"]
    return kind if low is None else f"{kind} ≥ {low:g}"


def _default(defaults: object, f: Field[Any]) -> str:
    return str(getattr(defaults, f.name)).encode("unicode_escape").decode()


def _help(f: Field[Any]) -> str:
    return str(f.metadata["help"])


if __name__ == "__main__":
    print(keys_markdown(), end="")
