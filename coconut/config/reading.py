"""RunConfig: every key of a run, its default, type and meaning; reading and checking YAML."""

from __future__ import annotations

import difflib
import importlib
import math
import os
import re
import stat
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from coconut.errors import UserError
from coconut.feedback.rules import parse

DATASET_METHODS = ("latro", "sft", "preexperiment")
"""Methods over a data set of data/latro: a prompt, a rationale in words, an answer."""
METHODS = (
    "coconut",
    "cot",
    "no_cot",
    "no_thoughts",
    "pause",
    "pause_as_thought",
    "coconut_no_curriculum",
    "icot",
    "recall",
    *DATASET_METHODS,
)
"""What a run trains; docs/methods.md explains each. The first four have published switches."""

PUBLISHED_SWITCHES = ("coconut", "cot", "no_thoughts", "no_cot")
WITH_LATENTS = ("coconut", "coconut_no_curriculum", "pause", "pause_as_thought")
"""Methods whose rows hold the markers and latent positions."""
WITH_FEEDBACK = ("coconut", "coconut_no_curriculum", "latro")
"""Methods whose latent positions receive a hidden state instead of a token's embedding."""
TASKS = ("prosqa", "hops")
"""What `generate` can make; the first is the default. Each is a file of data/."""
SHOWN = 60
"""Characters of a wrong value that a message repeats."""
CURRICULUM_KEYS = (
    *("c_thought", "epochs_per_stage", "max_latent_stage", "pad_latent_to_max", "uniform_prob"),
    *("stage", "n_latents", "stage_mixing", "latent_growth", "icot_tokens_per_epoch"),
    *("icot_smoothing", "icot_remove_all_after", "recall_sentences", "max_new_tokens", "swap_test"),
)
"""What the methods over a data set do not read."""
DATASET_KEYS = (
    *(
        "dataset_name",
        "test_path",
        "split",
        "validation_items",
        "split_seed",
        "chat_template",
        "prompt",
    ),
    *("response_length", "stop_token", "stop_token_ids", "pad_token", "answer_rule", "maj_k"),
    *("maj_temperature", "test_at_end"),
)
"""What only they read."""
PUBLISHED_NAMES = {
    "base_model_name_or_path": "model_id",
    "eval_model_name_or_path": "load_model_path",
    "model_name_or_path": "model_id",
    "run_name": "name",
    "learning_rate": "lr",
    "per_device_train_batch_size": "batch_size_training",
    "per_device_eval_batch_size": "eval_batch_size",
    "num_train_epochs": "num_epochs",
}
"""LaTRO's published argument -> the key it stands for."""


def key(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    any_text: bool = False,
) -> Any:
    """A configuration key: its default, its help line and the values it may take.

    any_text: line breaks and other characters that cannot be printed are meant.
    """
    metadata = {"help": help, "choices": choices, "low": low, "any_text": any_text}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


LATENT_GROWTH = ("stage", "one")
ADAPTERS = ("lora", "dora")
BITS, GROUP_SIZES = (4, 8), (32, 64, 128)
"""What a base may be quantised to: bits a weight, and weights that share a scale."""


@dataclass(frozen=True)
class Lora:
    """The keys under `lora`: what is trained beside a frozen base."""

    type: str = key("lora", "lora, or dora: with a learned length of every row", choices=ADAPTERS)
    rank: int = key(8, "columns of the two factors", low=1)
    scale: float = key(2.0, "factor of the update; alpha / rank in other programs", low=0)
    alpha: float | None = key(None, "sets scale to alpha / rank", low=0)
    dropout: float = key(0.0, "dropout on what the factors read", low=0)
    targets: list[str] = key(["all"], "linear layers, by name (q_proj, mlp.c_fc), or all")
    layers: int | None = key(None, "only the last so many blocks; all if none", low=1)
    quantize: int | None = key(None, "bits of the frozen base, 4 or 8; MLX only")
    group_size: int = key(64, "weights that share a scale of a quantised base: 32, 64 or 128")


@dataclass
class RunConfig:
    """One run. Keys of the first block carry the published names and meanings."""

    project: str = key("coconut", "project name for the tracker")
    save_path: str = key("runs", "folder that holds the run directories")
    name: str = key("run", "name of the run; its directory is save_path/name")
    only_eval: bool = key(False, "evaluate load_model_path (or model_id) once and stop")
    coconut: bool = key(False, "published switch for method: coconut")
    cot: bool = key(False, "published switch for method: cot")
    no_thoughts: bool = key(False, "published switch for method: no_thoughts")
    no_cot: bool = key(False, "published switch for method: no_cot")
    c_thought: int = key(1, "latents that replace one step", low=0)
    epochs_per_stage: int = key(3, "epochs before the next step is dropped", low=1)
    max_latent_stage: int = key(3, "last stage that adds latents; later ones drop all steps", low=0)
    pad_latent_to_max: bool = key(True, "give every row the stage's latents, however few its steps")
    save_only_improve: bool = key(False, "keep only the best and the last checkpoint")
    uniform_prob: float = key(0.0, "chance that a row's stage is redrawn from 0..its steps", low=0)
    model_id: str | None = key(None, "Hugging Face model, or a directory in its layout")
    model_config_path: str | None = key(None, "config.json of a model to start from random weights")
    load_model_path: str | None = key(None, "checkpoint to start from or to evaluate")
    seed: int = key(0, "seed of weights, order, curriculum draws and dropout", low=0)
    resume: int = key(0, "epochs of the schedule to skip; selects the stage it starts with", low=0)
    bf16: bool = key(False, "compute in bfloat16; weights and optimizer stay float32")
    train_path: str | None = key(None, "training data, JSON (see data/README.md)")
    val_path: str | None = key(None, "validation data, JSON")
    reset_optimizer: str = key(
        "stage",
        "when AdamW's moments are cleared; the published True means epoch, False never",
        choices=("never", "stage", "epoch"),
    )
    batch_size_training: int = key(32, "rows of a micro-batch, one process's", low=1)
    debug: bool = key(False, "5,000 training and 32 validation items, no checkpoint, no tracker")
    gradient_accumulation_steps: int = key(1, "micro-batches of one update, of each process", low=1)
    num_epochs: int = key(1, "epochs of the whole schedule, skipped ones included", low=0)
    lr: float = key(1e-4, "learning rate of AdamW", low=0)
    weight_decay: float = key(0.01, "decoupled weight decay, on every parameter", low=0)

    method: str | None = key(None, "what to train; replaces the four switches", choices=METHODS)
    stage: int | None = key(None, "evaluate at this stage, whatever resume says", low=0)
    n_latents: int | None = key(None, "evaluate with exactly this many latents", low=0)
    stage_mixing: str = key(
        "none",
        "draw stage i <= k with weight i+1 at stage k, per item or one for each micro-batch",
        choices=("none", "item", "batch"),
    )
    latent_growth: str = key(
        "stage", "add c_thought latents with each stage, or one at a time", choices=LATENT_GROWTH
    )
    icot_tokens_per_epoch: float = key(8.0, "iCoT: chain tokens removed per epoch", low=0)
    icot_smoothing: float = key(4.0, "iCoT: rate of the random extra removal; 0 for none", low=0)
    icot_remove_all_after: int | None = key(
        None, "iCoT: once this many are removed, remove the whole chain", low=1
    )
    recall_sentences: int = key(30, "recall: sentences of the question to repeat", low=1)
    tokenizer: str | None = key(
        None, "gpt2, prosqa, bytes, or a tokenizer directory; otherwise the model's own"
    )
    model_revision: str | None = key(
        None, "branch, tag or commit of model_id on the hub; otherwise its main branch"
    )
    generate: dict[str, Any] = key(
        {},
        "training data made as it is needed: task (prosqa or hops, a file of data/), items, seed,"
        " fresh, and the task's options; with fresh an option may be a list, a value an epoch, the"
        " last of which stays",
    )
    max_new_tokens: int | None = key(
        None, "longest answer; otherwise 64 if val_path contains gsm, else 128", low=1
    )
    temperature: float = key(0.0, "sampling temperature of evaluation; 0 is greedy", low=0)
    eval_batch_size: int = key(64, "questions a batch in evaluation", low=1)
    eval_every: int = key(
        1, "epochs between evaluations; the last epoch is always evaluated", low=1
    )
    swap_test: bool = key(True, "ProsQA: also ask for the other name, and count both right")
    log_every: int = key(50, "updates between lines on the terminal; log.jsonl has all", low=1)
    save_every: int = key(0, "updates between checkpoints inside an epoch; 0: none", low=0)
    keep_checkpoints: int = key(0, "checkpoints kept, the newest; 0: all", low=0)
    adam_beta2: float = key(0.999, "AdamW's second beta; 0.99 forgets sooner", low=0)
    max_grad_norm: float = key(0.0, "clip the gradient to this norm; 0: never", low=0)
    warmup_updates: int = key(0, "updates of linear warm-up", low=0)
    lr_schedule: str = key(
        "constant", "after the warm-up", choices=("constant", "linear", "cosine")
    )
    gradient_checkpointing: bool = key(False, "recompute block activations in the backward pass")
    shard: bool = key(
        False, "torch: spread weights, gradients and moments over the processes (FSDP)"
    )
    lora: dict[str, Any] = key(
        {}, "train low-rank adapters beside a frozen base; the keys of `lora` below"
    )
    pad_multiple: int = key(
        32, "lengths are padded to multiples of this, so few shapes occur", low=1
    )
    feedback: str | None = key(
        None, "what a latent receives (docs/feedback.md); otherwise the checkpoint's rule, or last"
    )
    replace_feedback: bool = key(
        False, "use feedback though the checkpoint was trained with another rule"
    )
    feedback_lr_multiplier: float = key(1.0, "rate of the rule's own weights, times lr", low=0)
    wandb: bool = key(False, "also log to Weights & Biases")
    report: bool = key(True, "draw the curves into the run's report.html and .png as it trains")

    dataset_name: str | None = key(
        None, "latro, sft: a file of data/latro (docs/data_sets.md); gsm8k_8shot: examples first"
    )
    test_path: str | None = key(None, "latro, sft: the test split; otherwise the data set's own")
    split: str = key(
        "test",
        "what only_eval answers; a preexperiment reads train",
        choices=("test", "validation", "train"),
    )
    validation_items: int = key(
        500, "items of train held out, where the set has no validation file of its own", low=1
    )
    split_seed: int = key(0, "which items are held out; the run's own seed does not matter", low=0)
    chat_template: str = key(
        "auto",
        "put questions into the tokenizer's chat template: if it has one, or always, or never",
        choices=("auto", "always", "never"),
    )
    prompt: str = key(
        "auto",
        "which wording asks: to reason, as sft is trained, as published for evaluating sft; auto"
        " takes the method's",
        choices=("auto", "reason", "sft", "sft_published"),
    )
    response_length: int = key(200, "tokens of a rationale, and of an evaluation's output", low=1)
    stop_token: str = key(
        "both", "what ends an output beside the end of a turn", choices=("eos", "pad", "both")
    )
    stop_token_ids: list[int] | None = key(None, "replaces stop_token")
    pad_token: str | None = key(
        None, "a token that is never written; otherwise the tokenizer's own, which must not be eos"
    )
    answer_rule: str = key(
        "corrected",
        "what accuracy counts; the other rule's score is reported beside it",
        choices=("corrected", "released"),
    )
    maj_k: int = key(0, "only_eval: samples of a majority vote beside the greedy answer", low=0)
    maj_temperature: float = key(1.0, "temperature of the votes", low=0)
    test_at_end: bool = key(False, "latro, sft: the best checkpoint answers the test split, once")

    where = "configuration"
    """What a message about a key names: the file it was read from."""

    @property
    def run_dir(self) -> Path:
        """Directory of the run."""
        return Path(self.save_path) / self.name

    @property
    def new_tokens(self) -> int:
        """Longest answer in tokens: the published rule unless max_new_tokens is set."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.method in DATASET_METHODS:
            return self.response_length
        return 64 if "gsm" in str(self.val_path) else 128

    @property
    def has_latents(self) -> bool:
        """Whether rows hold the markers and latent positions."""
        return self.method in WITH_LATENTS

    def problems(self, given: Mapping[Any, Any]) -> list[str]:
        """What a method of its own class finds wrong; given: the keys as they were written."""
        return []

    @property
    def adapter(self) -> Lora | None:
        """The keys under `lora` with their defaults; None trains every weight."""
        return None if not self.lora else _lora(self.lora)[0]

    def to_yaml(self) -> str:
        """The resolved configuration as a file that loads to the same run."""
        resolved = {f.name: getattr(self, f.name) for f in fields(self)}
        # The switches repeat `method`; written out they could only contradict an override.
        for switch in PUBLISHED_SWITCHES:
            del resolved[switch]
        return yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and `key=value` overrides; check everything that needs no model.

    Raises UserError with all problems at once: unknown or ill-typed keys, impossible combinations,
    missing files.
    """
    where = str(path)
    values = _read_yaml(path)
    problems: list[str] = []
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            problems.append(f"{override!r}: overrides are written key=value")
            continue
        try:
            value = _parse_yaml(text)
        except ValueError:
            problems.append(f"{name}: cannot read {text!r} as a YAML value; quote it")
            continue
        group, dot, inner = name.partition(".")
        if dot:
            nested = values.get(group) or {}
            values[group] = {**nested, inner: value} if isinstance(nested, dict) else {inner: value}
        else:
            values = {given: v for given, v in values.items() if not _gives_way(given, name)}
            values[name] = value
    return check_config(values, where, problems)


def _gives_way(given: Any, override: str) -> bool:
    """Whether a key of the file says what an override says anew, under another name."""
    if given in PUBLISHED_SWITCHES and override == "method":
        return True
    return PUBLISHED_NAMES.get(given, given) == PUBLISHED_NAMES.get(override, override)


def check_config(
    values: Mapping[Any, Any], where: str = "configuration", problems: list[str] | None = None
) -> RunConfig:
    """Turn a mapping into a RunConfig. Raises UserError with all problems at once."""
    problems = list(problems or [])
    if values.get("method") is not None and values["method"] not in METHODS:
        # All else depends on it.
        guess = _nearest(values["method"], METHODS)
        shown = _shown(values["method"]) + (f"; {guess}" if guess else "")
        problems.append(f"method: expected one of {', '.join(METHODS)}, got {shown}")
        raise UserError(where, *problems)
    kind: type[RunConfig] = RunConfig
    if values.get("method") in ("latro", "preexperiment"):
        from coconut.config.latro_keys import LatroConfig, with_preset

        kind, values = LatroConfig, with_preset(values)
    known = {f.name: f for f in fields(kind)}
    hints = typing.get_type_hints(kind)
    config = kind()
    config.where = where
    failed = set()
    for given, value in values.items():
        name = PUBLISHED_NAMES.get(given, given) if isinstance(given, str) else given
        if name != given and name in values:
            problems.append(f"{given}: stands for {name}, which is given too; drop one")
            continue
        if name not in known:
            advice = _nearest(name, known | PUBLISHED_NAMES) or "docs/keys.md lists them"
            problems.append(f"{_word(name)}: unknown key, {advice}")
            continue
        try:
            setattr(config, name, _convert(name, value, hints[name], known[name].metadata))
        except ValueError as error:
            problems.append(f"{given}: {error}")
            failed.add(name)
    together = [
        *_resolve_method(config),
        *_combinations(config),
        *_data_set_problems(config, values),
        *_generate_problems(config),
        *_lora_problems(config),
        *_missing_files(config),
        *config.problems(values),
    ]
    # A key that could not be read has its default here, about which nothing need be said.
    problems += [line for line in together if failed.isdisjoint(re.findall(r"\w+", line))]
    if problems:
        raise UserError(where, *[_as_given(line, values) for line in problems])
    return config


def _as_given(line: str, given: Mapping[Any, Any]) -> str:
    """A complaint in the names that the keys were given by."""
    for theirs, ours in PUBLISHED_NAMES.items():
        if theirs in given and ours != "name":  # which is a word, too
            line = re.sub(rf"\b{ours}\b", theirs, line)
    return line


def _read_yaml(path: str | Path) -> dict[Any, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(str(path), "no such file; the runs that ship lie in args/") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(str(path), f"cannot be read as a text file: {error}") from None
    try:
        values = _parse_yaml(text)
    except ValueError as error:
        raise UserError(str(path), str(error)) from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(str(path), "expected `key: value` lines")
    return values


class _Loader(yaml.SafeLoader):
    """Refuses a key that comes twice, of which the library would silently take the last."""

    def construct_mapping(self, node, deep=False):  # type: ignore[no-untyped-def]
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{_shown(key.value)} stands there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str) -> Any:
    """The value a YAML text stands for. Raises ValueError saying where it is broken."""
    try:
        return yaml.load(text, Loader=_Loader)
    # The library raises whatever a malformed scalar makes it stumble over: KeyError on
    # `!!bool x`, IndexError on `!!int`, AttributeError on `!!timestamp x`, and more.
    except Exception as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        what = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise ValueError(f"{place}not valid YAML: {what}") from None


def _convert(name: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    """Check one value against its key's type. Raises ValueError with the complaint."""
    optional = isinstance(hint, types.UnionType)
    if value is None or value == "None":  # the published files write the string
        if optional:
            return None
        if hint is str or value is None:
            raise ValueError("needs a value")
    if optional:
        hint = next(t for t in hint.__args__ if t is not types.NoneType)
    if metadata["any_text"]:
        texts = [value] if hint is str else value
        if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            wanted = "text" if hint is str else "a list of texts"
            raise ValueError(f"expected {wanted}, got {_shown(value)}")
        return value
    if name == "reset_optimizer" and isinstance(value, bool):
        return "epoch" if value else "never"
    if typing.get_origin(hint) is list:
        return _list(value, _CONVERTERS[hint.__args__[0]])
    value = _CONVERTERS[typing.get_origin(hint) or hint](value)
    choices, low = metadata["choices"], metadata["low"]
    if choices and value not in choices:
        guess = _nearest(value, choices)
        guess = f"; {guess}" if guess else ""
        raise ValueError(f"expected one of {', '.join(choices)}, got {_shown(value)}{guess}")
    if low is not None and value < low:
        raise ValueError(f"must be at least {low}, got {_shown(value)}")
    return value


def _nearest(name: Any, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 1) if isinstance(name, str) else []
    return f"did you mean {near[0]}?" if near else ""


def _word(name: Any) -> str:
    """A key as a message names it: bare if that is readable."""
    is_plain = isinstance(name, str) and name.isprintable() and len(name) <= SHOWN
    return name if is_plain else _shown(name)


def _shown(value: Any) -> str:
    """A wrong value as a message repeats it: quoted, and never longer than a line."""
    try:
        text = repr(value)
    # Python writes out neither endless nesting nor whole numbers of thousands of digits.
    except (RecursionError, ValueError):
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected True or False, got {_shown(value)}")
    return value


def _int(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"expected a whole number, got {_shown(value)}")
    if abs(value) >= 2**53:
        raise ValueError(f"too large: {_shown(value)}")
    return value


def _float(value: Any) -> float:
    # YAML 1.1 reads 1e-4 (without a dot) as text.
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"expected a number, got {_shown(value)}") from None
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {_shown(value)}")
    return number


def _str(value: Any) -> str:
    if isinstance(value, bool):
        word = "on, yes or true" if value else "off, no or false"
        raise ValueError(f"expected text; YAML takes {word} for {value}: write it in quotes")
    if isinstance(value, (int, float)):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"expected text, got {_shown(value)}")
    if "\0" in value or not value.isprintable():
        raise ValueError(f"holds characters that cannot be printed: {_shown(value)}")
    return value


def _dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
        raise ValueError(f"expected `key: value` lines, got {_shown(value)}")
    return value


def _list(value: Any, convert: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list, got {_shown(value)}")
    return [convert(inner) for inner in value]


_CONVERTERS: dict[Any, Any] = {bool: _bool, int: _int, float: _float, str: _str, dict: _dict}


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
    task = values.pop("task", TASKS[0])
    if task not in TASKS:
        return [f"generate.task: expected one of {', '.join(TASKS)}, got {_shown(task)}"]
    from coconut.tasks.generated import of_epoch

    maker = importlib.import_module(f"coconut.tasks.{task}")
    problems = []
    known = {"task", "items", "fresh", "seed"} | {f.name for f in fields(maker.Options)}
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
            of_epoch(maker.Options, values, epoch)
        except UserError as error:
            problems += [f"generate.{problem}" for problem in error.problems]
    return list(dict.fromkeys(problems))


def _lora(values: Mapping[str, Any]) -> tuple[Lora, list[str]]:
    """The keys under `lora` as far as they are right, and what is wrong with the others."""
    known = {f.name: f for f in fields(Lora)}
    hints, found, problems = typing.get_type_hints(Lora), {}, []
    for name, value in values.items():
        if name not in known:
            advice = _nearest(name, known) or f"known: {', '.join(known)}"
            problems.append(f"lora.{_word(name)}: unknown key, {advice}")
            continue
        if name == "targets" and isinstance(value, str):
            value = [value]
        try:
            found[name] = _convert(name, value, hints[name], known[name].metadata)
        except ValueError as error:
            problems.append(f"lora.{name}: {error}")
    lora = Lora(**found)
    if lora.alpha is not None:
        if "scale" in found and lora.scale != lora.alpha / lora.rank:
            problems.append("lora.alpha: sets scale to alpha / rank, and scale says otherwise")
        lora = replace(lora, scale=lora.alpha / lora.rank, alpha=None)
    return lora, problems


def lora_of(values: Mapping[str, Any]) -> Lora:
    """A Lora from what `dataclasses.asdict` made of one. Raises ValueError for anything else."""
    lora, problems = _lora(values)
    if problems:
        raise ValueError("; ".join(problems))
    return lora


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


if __name__ == "__main__":
    # By name: mypy cannot follow an import back to this file.
    print(importlib.import_module("coconut.config.reference").keys_markdown(), end="")
