"""What is wrong with a run's keys together, said before a model is loaded."""

from __future__ import annotations

import os
import stat
import typing
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from coconut.config.keys import (
    CURRICULUM_KEYS,
    DATASET_KEYS,
    DATASET_METHODS,
    PUBLISHED_NAMES,
    PUBLISHED_SWITCHES,
    WITH_FEEDBACK,
    WITH_LATENTS,
    RunConfig,
)
from coconut.config.lora_keys import BITS, GROUP_SIZES, _lora
from coconut.config.values import _bool, _int, _nearest, _shown, _word
from coconut.errors import UserError
from coconut.feedback.rules import parse
from coconut.tasks.generated import of_epoch
from coconut.tasks.makers import TASKS, maker


def _resolve_method(config: RunConfig) -> list[str]:
    """Set `method` from the published switches; exactly one way to say it."""
    on = [switch for switch in PUBLISHED_SWITCHES if getattr(config, switch)]
    if config.method is None and len(on) == 1:
        config.method = on[0]
    elif config.method is None:
        found = " and ".join(on) if on else "none"
        names = ", ".join(PUBLISHED_SWITCHES)
        return [f"method: exactly one of {names} must be True ({found} is), or set method"]
    elif on and on != [config.method]:
        return [f"method: {config.method} contradicts {' and '.join(on)}: True; drop one of them"]
    for switch in PUBLISHED_SWITCHES:
        setattr(config, switch, switch == config.method)
    return []


def _resolve_tracker(config: RunConfig) -> list[str]:
    """`wandb: True` and `report_to: wandb` say the same; set both."""
    if config.wandb and config.report_to == "none":
        config.report_to = "wandb"
    elif config.wandb and config.report_to != "wandb":
        return [f"report_to: {config.report_to} contradicts wandb: True; drop one of them"]
    config.wandb = config.report_to == "wandb"
    return []


def _combinations(config: RunConfig) -> list[str]:
    """Keys that are right one by one but not together."""
    c, problems = config, []

    def check(bad: bool, text: str) -> None:
        if bad:
            problems.append(text)

    if c.feedback is not None:
        check(
            c.method not in WITH_FEEDBACK,
            f"feedback: nothing is fed back with {c.method}; remove the key",
        )
        try:
            rule = parse(c.feedback)
            alone = rule.find("shuffle") and 1 in (c.batch_size_training, c.eval_batch_size)
            check(bool(alone), "feedback: shuffle needs batches of two rows or more")
        except ValueError as error:
            problems.append(f"feedback: {error}")
    check(
        c.replace_feedback and c.feedback is None,
        "replace_feedback: by which rule? set feedback too",
    )
    latent = c.method in WITH_LATENTS
    staged = latent or c.method == "no_thoughts"
    asks = c.method in DATASET_METHODS
    check(latent and c.c_thought < 1, f"c_thought: {c.method} needs at least 1 latent per step")
    check(
        c.uniform_prob > 0 and not staged,
        f"uniform_prob: draws stages, which {c.method} does not have; set it to 0",
    )
    check(c.adam_beta2 >= 1, f"adam_beta2: must be below 1, got {c.adam_beta2}")
    check(c.uniform_prob > 1, f"uniform_prob: a probability, at most 1, got {c.uniform_prob}")
    check(
        c.stage_mixing != "none" and not staged,
        f"stage_mixing: mixes stages, which {c.method} does not have; set it to none",
    )
    check(
        c.stage_mixing != "none" and c.uniform_prob > 0,
        "stage_mixing: cannot be combined with uniform_prob; set one of them",
    )
    check(
        c.n_latents is not None and not latent and c.method != "latro",
        f"n_latents: {c.method} has no latents; remove the key",
    )
    check(
        c.n_latents is not None and not c.only_eval and latent,
        "n_latents: forces an evaluation only; set only_eval: True or remove the key",
    )
    check(
        c.stage is not None and not c.only_eval,
        "stage: selects an evaluation's stage; set only_eval: True, or use resume for training",
    )
    check(
        c.only_eval and not c.load_model_path and not c.model_id,
        "load_model_path: only_eval needs the checkpoint to evaluate (or model_id, of the hub)",
    )
    check(
        not c.only_eval and c.method != "latro" and c.resume >= c.num_epochs,
        f"resume: {c.resume} skips all {c.num_epochs} epochs, nothing is left to train",
    )
    check(
        not (c.model_id or c.model_config_path or c.load_model_path),
        "model_id: name a model, or give model_config_path or load_model_path",
    )
    check(
        bool(c.model_id and c.model_config_path),
        "model_config_path: starts from random weights and contradicts model_id; drop one",
    )
    check(
        bool(c.model_config_path and not c.load_model_path and not c.tokenizer),
        "tokenizer: a model from model_config_path needs one (gpt2, prosqa or a directory)",
    )
    check(
        c.model_revision is not None and (not c.model_id or os.path.isdir(c.model_id)),
        "model_revision: chooses a version of a model on the hub; give its name as model_id",
    )
    check(c.val_path is None and not asks, "val_path: missing")
    check(
        not c.only_eval and not asks and not c.train_path and not c.generate,
        "train_path: missing (or describe the data to make under generate)",
    )
    check(
        c.name in ("", ".", "..") or "/" in c.name or "\\" in c.name,
        f"name: must be a plain directory name, got {c.name!r}",
    )
    # 255 bytes is the limit of the usual file systems; a name grows while it is being written.
    check(len(c.name.encode()) > 200, f"name: longer than 200 bytes: {_shown(c.name)}")
    check(not c.save_path, "save_path: must not be empty")
    return problems


def _data_set_problems(config: RunConfig, given: Mapping[Any, Any]) -> list[str]:
    """What is wrong with `dataset_name`, and keys a method does not read as it has one or none."""
    name, asks = config.dataset_name, config.method in DATASET_METHODS
    if not asks and config.method is not None:
        for_others = ", ".join(DATASET_METHODS)
        return [
            f"{key}: is for {for_others}; remove it or set method"
            for key in not_default(given, DATASET_KEYS, RunConfig)
        ]
    if not asks:
        return []
    problems = []
    if config.method == "sft":
        problems += not_read(config, not_default(given, CURRICULUM_KEYS, RunConfig))
    if name is None:
        return [*problems, f"dataset_name: missing; {config.method} needs one"]
    from coconut.tasks import questions as latro

    base, n_shots = latro.parse_name(name)
    if base not in latro.names():
        advice = _nearest(base, latro.names()) or f"known: {', '.join(latro.names())}"
        advice += "; docs/data_sets.md says how to add one"
        problems.append(f"dataset_name: no data set {_shown(name)}, {advice}")
    if n_shots and not config.only_eval and config.method != "preexperiment":
        problems.append(f"dataset_name: {name} puts examples first, for evaluation only")
    if config.generate:
        problems.append("generate: makes ProsQA items, which a data set's methods do not read")
    if config.only_eval and config.split == "test" and config.val_path is not None:
        problems.append("val_path: is not the test split; set test_path, or split: validation")
    if config.maj_k and not config.only_eval:
        problems.append("maj_k: a vote is of an evaluation; set only_eval: True")
    return problems


def not_default(
    given: Mapping[Any, Any], names: typing.Iterable[str], kind: type[RunConfig]
) -> list[str]:
    """Those of the keys that are given with another value than their default.

    A resolved configuration names every key, at its default; only another value is a wish.
    """
    defaults = kind()
    values = {PUBLISHED_NAMES.get(name, name): value for name, value in given.items()}
    return [n for n in names if values.get(n) not in (None, "None", getattr(defaults, n))]


def not_read(config: RunConfig, names: typing.Iterable[str]) -> list[str]:
    """A complaint for each of the keys, which the run's method has no use for."""
    return [f"{name}: {config.method} does not read it; remove it" for name in names]


def _generate_problems(config: RunConfig) -> list[str]:
    """What is wrong with the keys under `generate`: ours, and the options of the task's file."""
    if not config.generate:
        return []
    values = dict(config.generate)
    task = values.pop("task", next(iter(TASKS)))
    if task not in TASKS:
        return [f"generate.task: expected one of {', '.join(TASKS)}, got {_shown(task)}"]
    options = maker(task).Options
    problems = []
    known = {"task", "items", "fresh", "seed"} | {f.name for f in fields(options)}
    for name in [name for name in values if name not in known]:
        del values[name]
        advice = _nearest(name, known) or f"known: {', '.join(sorted(known))}"
        problems.append(f"generate.{_word(name)}: unknown key, {advice}")
    for name, convert, low in (("items", _int, 1), ("fresh", _bool, 0), ("seed", _int, 0)):
        if name not in values:
            continue
        value = values.pop(name)
        try:
            if convert(value) < low:
                raise ValueError(f"must be at least {low}, got {_shown(value)}")
        except ValueError as error:
            problems.append(f"generate.{name}: {error}")
    for name, value in list(values.items()):
        each = value if isinstance(value, list) else [value]
        if huge := [v for v in each if isinstance(v, int) and abs(v) >= 2**53]:
            problems.append(f"generate.{name}: too large: {_shown(huge[0])}")
            del values[name]
    if "items" not in config.generate:
        problems.append("generate.items: missing; how many items to make")
    lists = {name: value for name, value in values.items() if isinstance(value, list)}
    for name, value in lists.items():
        if not value:
            problems.append(f"generate.{name}: the list is empty")
        elif not config.generate.get("fresh"):
            problems.append(f"generate.{name}: a list, a value an epoch, needs fresh: True")
    if not all(lists.values()):
        return problems
    for epoch in range(max(map(len, lists.values()), default=1)):
        try:
            of_epoch(options, values, epoch)
        except UserError as error:
            problems += [f"generate.{problem}" for problem in error.problems]
    return list(dict.fromkeys(problems))


def _lora_problems(config: RunConfig) -> list[str]:
    """What is wrong with the keys under `lora`, alone and with the others."""
    if not config.lora:
        return []
    lora, problems = _lora(config.lora)

    def check(bad: bool, text: str) -> None:
        if bad:
            problems.append(f"lora.{text}")

    check(lora.scale == 0, "scale: must be above 0, or nothing is trained")
    check(not lora.targets, "targets: the list is empty")
    check(lora.dropout >= 1, f"dropout: must be below 1, got {lora.dropout}")
    check(
        lora.quantize is not None and lora.quantize not in BITS,
        f"quantize: expected 4 or 8 bits, got {lora.quantize}",
    )
    check(
        lora.group_size not in GROUP_SIZES,
        f"group_size: expected 32, 64 or 128, got {lora.group_size}",
    )
    check(
        "group_size" in config.lora and lora.quantize is None,
        "group_size: belongs to quantize, which is not set",
    )
    check(
        bool(config.model_config_path) and not config.load_model_path,
        "type: needs trained weights under it; give model_id or load_model_path, not"
        " model_config_path",
    )
    return problems


def _missing_files(config: RunConfig) -> list[str]:
    problems = []
    wanted = [("val_path", config.val_path), ("model_config_path", config.model_config_path)]
    wanted.append(("test_path", config.test_path))
    if not config.only_eval and not config.generate:
        wanted.append(("train_path", config.train_path))
    for name, path in wanted:
        if path and not os.path.isfile(path):
            problems.append(f"{name}: no such file: {path}{_remedy(path)}")
    path = config.load_model_path
    if path and not os.path.exists(path):
        problems.append(f"load_model_path: no such checkpoint: {path}")
    try:
        if not stat.S_ISDIR(os.stat(config.run_dir).st_mode):
            problems.append(f"name: {config.run_dir} is a file; the run needs a directory there")
    except FileNotFoundError:
        pass  # the usual case: the run makes it
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        problems.append(f"save_path: {_shown(str(config.run_dir))} cannot be used: {reason}")
    return problems


def _remedy(path: str) -> str:
    for prefix, builder in (("prosqa", "prosqa"), ("prontoqa", "prontoqa"), ("gsm", "gsm8k")):
        if Path(path).name.startswith(prefix):
            return f" (data/README.md says how data/{builder}.py makes it)"
    return ""
