"""Keys of other programs' files that are no key here: which values change nothing, what to use.

Names that only stand for another are `aliases` of the key's own field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NOTHING = (None, "None", "", False)
_ADAMW = ("adamw", "adamw_hf", "adamw_torch", "adamw_torch_fused")

INSTEAD: dict[str, tuple[tuple[Any, ...], str]] = {
    # TrainingArguments of transformers
    "warmup_ratio": ((0, *_NOTHING), "set warmup_updates; --check says how many updates there are"),
    "save_strategy": (("epoch",), "every epoch is saved; save_every adds checkpoints inside one"),
    "save_steps": (_NOTHING, "set save_every, updates between checkpoints inside an epoch"),
    "adam_beta1": ((0.9,), "AdamW's first beta is 0.9 here; remove it, or set adam_beta2"),
    "adam_epsilon": ((1e-8,), "AdamW's epsilon is 1e-8 here; remove it"),
    "optim": (_ADAMW, "AdamW is the optimizer here; remove it"),
    "fp16": (_NOTHING, "there is no float16; set bf16: True"),
    "resume_from_checkpoint": (
        (True, None, "None", ""),
        "a run continues from its own last checkpoint; to start from another set load_model_path,"
        " to start anew choose another name",
    ),
    "push_to_hub": (_NOTHING, "upload a checkpoint with `publish` when it is trained"),
    "deepspeed": (_NOTHING, "set shard: True (torch), or train an adapter (lora: {rank: 8})"),
    "use_lora": (_NOTHING, "give the adapter's keys: lora: {rank: 8}"),
    # The Qwen fork of Coconut
    "system_prompt": (_NOTHING, "no prompt is put before questions; write it into the data"),
    "cot_epochs": (
        (0, *_NOTHING),
        "train method: cot for so many epochs, then start from its checkpoint (load_model_path)",
    ),
    "bf16_weight": (_NOTHING, "weights stay float32; bf16: True computes in bfloat16"),
    "opt_8b": (_NOTHING, "AdamW's moments stay float32"),
}
"""Key -> (values that say what holds here anyway, what to use instead of others)."""

NOTED = ("bf16_weight", "opt_8b")
"""Keys that only save memory: without them a run computes the same, more exactly. Only said."""


def without_others(
    values: Mapping[Any, Any], known: Mapping[str, Any]
) -> tuple[dict[Any, Any], list[str], tuple[str, ...]]:
    """(values without the keys of INSTEAD, problems with those, what is to be said of them).

    known: keys of this run's class, which come first.
    """
    kept: dict[Any, Any] = {}
    problems: list[str] = []
    notes: list[str] = []
    for name, value in values.items():
        if name in known or name not in INSTEAD:
            kept[name] = value
        elif isinstance(value, (list, dict)) or value not in INSTEAD[name][0]:
            said = notes if name in NOTED and value is True else problems
            said.append(f"{name}: {INSTEAD[name][1]}")
    return kept, problems, tuple(notes)
