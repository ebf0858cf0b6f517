"""Keys of other programs' files that are no key here: which values change nothing, what to use.

Names that only stand for another are `aliases` of the key's own field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NOTHING = (None, "None", "", False)
_SAME = {
    "evaluation_strategy": "eval_strategy",
    "dtype": "torch_dtype",
    "max_length": "max_seq_length",
}
_EITHER = (True, False)
_ADAPTER = "give the adapter's keys: lora: {rank: 8}"
_ATTENTION = (None, "eager", "sdpa", "flash_attention_2")
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
    **dict.fromkeys(("use_lora", "use_peft"), (_NOTHING, _ADAPTER)),
    **dict.fromkeys(
        ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"), ((), _ADAPTER)
    ),
    "eval_strategy": (("epoch",), "set eval_every, epochs between evaluations"),
    "eval_steps": (_NOTHING, "set eval_every, epochs between evaluations"),
    "logging_strategy": (("steps",), "log.jsonl has every update; set log_every"),
    "logging_first_step": (_EITHER, "the first update is always logged; remove it"),
    "logging_dir": (_NOTHING, "logs lie in the run's own directory; remove it"),
    "torch_dtype": (("auto", "float32", None), "weights stay float32; set bf16: True"),
    "attn_implementation": (_ATTENTION, "how attention is computed changes no result; remove it"),
    "trust_remote_code": (_NOTHING, "no code that comes with a model is run; remove it"),
    "load_best_model_at_end": (_EITHER, "the best checkpoint is always kept; remove it"),
    "metric_for_best_model": (
        ("accuracy", "eval_accuracy", None),
        "the best checkpoint is that of the highest accuracy; remove it",
    ),
    "greater_is_better": ((True, None), "the best checkpoint has the highest accuracy; remove it"),
    "overwrite_output_dir": (_NOTHING, "nothing is overwritten; choose another name"),
    "remove_unused_columns": (_EITHER, "only what is named is read; remove it"),
    "do_train": ((True,), "set only_eval: True to train nothing"),
    "do_eval": ((True,), "set num_evaluations: 0 (latro) or eval_every"),
    "max_seq_length": (_NOTHING, "no row is cut; one that is too long is named"),
    "packing": (_NOTHING, "rows are padded, never joined; remove it"),
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

LATRO: dict[str, tuple[tuple[Any, ...], str]] = {
    "save_strategy": (("steps",), "set save_steps, updates between checkpoints"),
    "eval_strategy": (("steps",), "set num_evaluations, so many over the training"),
    "eval_steps": (_NOTHING, "set num_evaluations, so many over the training"),
    "max_steps": ((-1,), "set total_updates"),
}
"""What of INSTEAD is otherwise for LaTRO, which counts updates."""

NOTED = ("bf16_weight", "opt_8b")
"""Keys that only save memory: without them a run computes the same, more exactly. Only said."""


def without_others(
    values: Mapping[Any, Any], known: Mapping[str, Any]
) -> tuple[dict[Any, Any], list[str], tuple[str, ...]]:
    """(values without the keys of INSTEAD, problems with those, what is to be said of them).

    known: keys of this run's class, which come first.
    """
    instead = INSTEAD | LATRO if "total_updates" in known else INSTEAD
    kept: dict[Any, Any] = {}
    problems: list[str] = []
    notes: list[str] = []
    for name, value in values.items():
        name_of = _SAME.get(name, name)
        if name in known or name_of not in instead:
            kept[name] = value
        elif isinstance(value, (list, dict)) or value not in instead[name_of][0]:
            said = notes if name in NOTED and value is True else problems
            said.append(f"{name}: {instead[name_of][1]}")
    return kept, problems, tuple(notes)
