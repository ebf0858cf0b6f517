"""What is wrong with a run's keys together, said before a model is loaded."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from coconut.config import keys as of_runs
from coconut.config.generate_keys import generate_problems
from coconut.config.keys import RunConfig
from coconut.config.latro_keys import PRESETS
from coconut.config.lora_keys import read_lora
from coconut.config.values import shown
from coconut.errors import UserError
from coconut.feedback.rules import parse
from coconut.files import read_json
from coconut.tasks import official, questions

GPT2_ROWS = range(50257, 50305)
"""Embedding rows of a model that reads GPT-2's tokens: latent markers and padding included."""


def problems_together(config: RunConfig, given: Mapping[Any, Any]) -> list[str]:
    """What is wrong with keys that are right one by one; given: all, as they were written.

    Sets `method` from the published switches, and where a model is described if that was said in
    another way.
    """
    _resolve_model(config)
    return [
        *_resolve_method(config),
        *_resolve_tracker(config),
        *_combinations(config),
        *_data_set_problems(config),
        *_not_read(config, given),
        *generate_problems(config.generate),
        *_lora_problems(config),
        *_missing_files(config),
        *config.problems(),
    ]


def _resolve_method(config: RunConfig) -> Iterator[str]:
    """Set `method` from the published switches; exactly one way to say it."""
    on = [switch for switch in of_runs.PUBLISHED_SWITCHES if getattr(config, switch)]
    if config.method is None and len(on) == 1:
        config.method = on[0]
    elif config.method is None:
        found = " and ".join(on) if on else "none"
        names = ", ".join(of_runs.PUBLISHED_SWITCHES)
        yield f"method: exactly one of {names} must be True ({found} is), or set method"
        return
    elif on and on != [config.method]:
        yield f"method: {config.method} contradicts {' and '.join(on)}: True; drop one of them"
        return
    for switch in of_runs.PUBLISHED_SWITCHES:
        setattr(config, switch, switch == config.method)


def _resolve_model(config: RunConfig) -> None:
    """A `model_id` that is a config.json is `model_config_path`; with GPT-2's words, its tokenizer.

    So the published runs that start from random weights say it.
    """
    name = config.model_id
    if name and not config.model_config_path and (name.endswith(".json") or os.path.isfile(name)):
        config.model_id, config.model_config_path = None, name
    path = config.model_config_path
    if not path or config.load_model_path or config.tokenizer or not os.path.isfile(path):
        return
    with suppress(UserError):  # said where the model is opened
        model = read_json(Path(path))
        if model.get("model_type") in ("gpt2", None) and model.get("vocab_size") in GPT2_ROWS:
            config.tokenizer = "gpt2"


def _resolve_tracker(config: RunConfig) -> Iterator[str]:
    """`wandb: True` and `report_to: wandb` say the same; set both."""
    if config.wandb and config.report_to == "none":
        config.report_to = "wandb"
    elif config.wandb and config.report_to != "wandb":
        yield f"report_to: {config.report_to} contradicts wandb: True; drop one of them"
    config.wandb = config.report_to == "wandb"


def _combinations(config: RunConfig) -> Iterator[str]:
    """Keys that are right one by one but not together."""
    c = config
    if c.feedback is not None:
        if c.method not in of_runs.WITH_FEEDBACK:
            yield f"feedback: nothing is fed back with {c.method}; remove the key"
        try:
            if parse(c.feedback).find("shuffle") and 1 in (
                c.batch_size_training,
                c.eval_batch_size,
            ):
                yield "feedback: shuffle needs batches of two rows or more"
        except ValueError as error:
            yield f"feedback: {error}"
    if c.replace_feedback and c.feedback is None:
        yield "replace_feedback: by which rule? set feedback too"
    latent, staged = c.method in of_runs.WITH_LATENTS, c.method in of_runs.WITH_STAGE
    asks = c.method in of_runs.DATASET_METHODS
    if latent and c.c_thought < 1:
        yield f"c_thought: {c.method} needs at least 1 latent per step"
    if c.uniform_prob > 0 and not staged:
        yield f"uniform_prob: draws stages, which {c.method} does not have; set it to 0"
    if c.stage_mixing != "none" and not staged:
        yield f"stage_mixing: mixes stages, which {c.method} does not have; set it to none"
    if c.stage_mixing != "none" and c.uniform_prob > 0:
        yield "stage_mixing: cannot be combined with uniform_prob; set one of them"
    if c.n_latents is not None and not latent and c.method != "latro":
        yield f"n_latents: {c.method} has no latents; remove the key"
    if c.n_latents is not None and not c.only_eval and latent:
        yield "n_latents: forces an evaluation only; set only_eval: True or remove the key"
    if c.stage is not None and not c.only_eval:
        yield (
            "stage: selects an evaluation's stage; set only_eval: True, or use resume for training"
        )
    if c.only_eval and not c.load_model_path and not c.model_id:
        yield (
            "load_model_path: only_eval needs the checkpoint to evaluate (or model_id, of the hub)"
        )
    if not c.only_eval and c.method != "latro" and c.resume >= c.num_epochs:
        yield f"resume: {c.resume} skips all {c.num_epochs} epochs, nothing is left to train"
    if not (c.model_id or c.model_config_path or c.load_model_path):
        yield "model_id: name a model, or give model_config_path or load_model_path"
    if c.model_id and c.model_config_path:
        yield "model_config_path: starts from random weights and contradicts model_id; drop one"
    if c.model_config_path and not c.load_model_path and not c.tokenizer:
        yield "tokenizer: a model from model_config_path needs one (gpt2, prosqa or a directory)"
    if c.model_revision is not None and (not c.model_id or os.path.isdir(c.model_id)):
        yield "model_revision: chooses a version of a model on the hub; give its name as model_id"
    if c.val_path is None and not asks:
        yield "val_path: missing"
    if not c.only_eval and not asks and not c.train_path and not c.generate:
        yield "train_path: missing (or describe the data to make under generate)"
    if c.name in ("", ".", "..") or "/" in c.name or "\\" in c.name:
        yield f"name: must be a plain directory name, got {c.name!r}"
    # 255 bytes is the limit of the usual file systems; a name grows while it is being written.
    if len(c.name.encode()) > 200:
        yield f"name: longer than 200 bytes: {shown(c.name)}"
    if not c.save_path:
        yield "save_path: must not be empty"


def _data_set_problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with `dataset_name` and the keys about it."""
    name = config.dataset_name
    if config.method not in of_runs.DATASET_METHODS:
        return
    if name is None:
        yield f"dataset_name: missing; {config.method} needs one"
        return
    base, n_shots = questions.parse_name(name)
    if problem := questions.no_such_set(base):
        yield f"dataset_name: {problem}"
    if n_shots and not config.only_eval and config.method != "preexperiment":
        yield f"dataset_name: {name} puts examples first, for evaluation only"
    if config.only_eval and config.split == "test" and config.val_path is not None:
        yield "val_path: is not the test split; set test_path, or split: validation"
    if config.maj_k and not config.only_eval:
        yield "maj_k: a vote is of an evaluation; set only_eval: True"


def _not_read(config: RunConfig, given: Mapping[Any, Any]) -> Iterator[str]:
    """A complaint for each key that the run's method has no use for.

    A resolved configuration names every key, at its default; only another value is a wish. And the
    published files give every method of the curriculum the keys of all of them.
    """
    values = {of_runs.PUBLISHED_NAMES.get(name, name): value for name, value in given.items()}
    preset, defaults = PRESETS.get(getattr(config, "preset", ""), {}), type(config)()
    for f in fields(config):
        readers = f.metadata["read_by"] or of_runs.METHODS
        is_wish = values.get(f.name) not in (None, "None", getattr(defaults, f.name))
        if config.method in (None, *readers) or not is_wish or f.name in preset:
            continue
        if config.method in of_runs.DATASET_METHODS:
            yield f"{f.name}: {config.method} does not read it; remove it"
        elif set(readers) <= set(of_runs.DATASET_METHODS):
            for_others = ", ".join(of_runs.DATASET_METHODS)
            yield f"{f.name}: is for {for_others}; remove it or set method"


def _lora_problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with the keys under `lora`, alone and with the others."""
    if not config.lora:
        return
    lora, problems = read_lora(config.lora)
    yield from problems
    if not lora.targets:
        yield "lora.targets: the list is empty"
    if "group_size" in config.lora and lora.quantize is None:
        yield "lora.group_size: belongs to quantize, which is not set"
    if config.model_config_path and not config.load_model_path:
        yield (
            "lora.type: needs trained weights under it; give model_id or load_model_path, not"
            " model_config_path"
        )


def _missing_files(config: RunConfig) -> Iterator[str]:
    wanted = [("val_path", config.val_path), ("model_config_path", config.model_config_path)]
    wanted.append(("test_path", config.test_path))
    if not config.only_eval and not config.generate:
        wanted.append(("train_path", config.train_path))
    if config.generate and Path(str(config.train_path)).name in official.PROSQA:
        yield "train_path: is an official file's name; give what generate makes another"
    for name, path in wanted:
        if path and (note := official.note(path)):
            config.notes += (f"{name}: {note}",)
        elif path and not os.path.isfile(path):
            yield f"{name}: no such file: {path}{_remedy(path)}"
    path = config.load_model_path
    if path and not os.path.exists(path):
        yield f"load_model_path: no such checkpoint: {path}"
    try:
        if not stat.S_ISDIR(os.stat(config.run_dir).st_mode):
            yield f"name: {config.run_dir} is a file; the run needs a directory there"
    except FileNotFoundError:
        pass  # the usual case: the run makes it
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        yield f"save_path: {shown(str(config.run_dir))} cannot be used: {reason}"


def _remedy(path: str) -> str:
    for prefix, builder in (("prosqa", "prosqa"), ("prontoqa", "prontoqa"), ("gsm", "gsm8k")):
        if Path(path).name.startswith(prefix):
            return f" (data/README.md says how data/{builder}.py makes it)"
    return ""
