"""RunConfig: the keys of a run. All that is said of a key stands in its field."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from coconut.config.lora_keys import Lora, read_lora
from coconut.config.values import key

CURRICULUM = (
    *("coconut", "cot", "no_cot", "no_thoughts", "pause", "pause_as_thought"),
    *("coconut_no_curriculum", "icot", "recall"),
)
DATASET_METHODS = ("latro", "sft", "preexperiment")
"""Methods over a data set of data/latro: a prompt, a rationale in words, an answer."""
METHODS = (*CURRICULUM, *DATASET_METHODS)
"""What a run trains; docs/methods.md explains each. The first four have published switches."""

WITH_LATENTS = ("coconut", "coconut_no_curriculum", "pause", "pause_as_thought")
"""Methods whose rows hold the markers and latent positions."""
WITH_STAGE = (*WITH_LATENTS, "no_thoughts")
"""Methods whose rows a stage changes."""
WITH_FEEDBACK = ("coconut", "coconut_no_curriculum", "latro")
"""Methods whose latent positions receive a hidden state instead of a token's embedding."""
TRAINED = tuple(method for method in METHODS if method != "preexperiment")
"""Methods that make a model."""
BY_EPOCH = tuple(method for method in TRAINED if method != "latro")
"""Methods that are evaluated and saved after epochs; LaTRO counts updates."""

LATENT_GROWTH = ("stage", "one")
SWITCHES = "Published switches"

# Kinds of keys: the heading that they stand under, and who reads them where not all methods do.
_run = partial(key, group="The run")
_model = partial(key, group="Model")
_data = partial(key, group="Data")
_stage = partial(key, group="Stages and latents", read_by=WITH_STAGE)
_latents = partial(_stage, read_by=WITH_LATENTS)
_fed = partial(_stage, read_by=WITH_FEEDBACK)
_icot = partial(key, group="Of single methods", read_by=("icot",))
_update = partial(key, group="Updates", read_by=TRAINED)
_ask = partial(key, group="Evaluation", read_by=TRAINED)
_file = partial(key, group="Files and lines", read_by=TRAINED)
_words = partial(key, group="Questions with rationales in words", read_by=DATASET_METHODS)
_answers = partial(_words, read_by=("latro", "sft"))
_switch = partial(key, group=SWITCHES)


@dataclass
class RunConfig:
    """One run. What the published code has too keeps its name and meaning."""

    project: str = _run("coconut", "project name for the tracker")
    save_path: str = _run("runs", "folder that holds the run directories")
    name: str = _run(
        "run", "name of the run; its directory is save_path/name", aliases=("run_name",)
    )
    seed: int = _run(0, "seed of weights, order, curriculum draws and dropout", low=0)
    method: str | None = _run(None, "what to train; replaces the four switches", choices=METHODS)
    only_eval: bool = _run(False, "evaluate load_model_path (or model_id) once and stop")
    resume: int = _run(
        0,
        "epochs of the schedule to skip; selects the stage it starts with",
        low=0,
        read_by=BY_EPOCH,
    )
    debug: bool = _run(False, "5,000 training and 32 validation items, no checkpoint, no tracker")

    model_id: str | None = _model(
        None,
        "Hugging Face model, or a directory in its layout",
        aliases=("base_model_name_or_path", "model_name_or_path"),
    )
    model_revision: str | None = _model(
        None, "branch, tag or commit of model_id on the hub; otherwise its main branch"
    )
    model_config_path: str | None = _model(
        None, "config.json of a model to start from random weights", read_by=TRAINED
    )
    load_model_path: str | None = _model(
        None, "checkpoint to start from or to evaluate", aliases=("eval_model_name_or_path",)
    )
    tokenizer: str | None = _model(
        None, "gpt2, prosqa, bytes, or a tokenizer directory; otherwise the model's own"
    )
    bf16: bool = _model(False, "compute in bfloat16; weights and optimizer stay float32")

    train_path: str | None = _data(None, "training data, JSON (see data/README.md)")
    val_path: str | None = _data(None, "validation data, JSON")
    generate: dict[str, Any] = _data(
        {}, "training data made as it is needed; the keys of `generate` below", read_by=CURRICULUM
    )

    c_thought: int = _latents(1, "latents that replace one step", low=0)
    epochs_per_stage: int = _stage(
        3,
        "epochs before the next step is dropped",
        low=1,
        read_by=("coconut", "pause_as_thought", "no_thoughts"),
    )
    max_latent_stage: int = _stage(
        3, "last stage that adds latents; later ones drop all steps", low=0
    )
    pad_latent_to_max: bool = _latents(
        True, "give every row the stage's latents, however few its steps"
    )
    latent_growth: str = _stage(
        "stage",
        "add c_thought latents with each stage, or one at a time",
        choices=LATENT_GROWTH,
        read_by=("coconut", "pause_as_thought"),
    )
    uniform_prob: float = _stage(
        0.0,
        "chance that a row's stage is redrawn from 0..its steps",
        low=0,
        high=1,
        complaint="a probability, at most 1",
    )
    stage_mixing: str = _stage(
        "none",
        "draw stage i <= k with weight i+1 at stage k, per item or one for each micro-batch",
        choices=("none", "item", "batch"),
    )
    stage: int | None = _stage(None, "evaluate at this stage, whatever resume says", low=0)
    n_latents: int | None = _latents(None, "evaluate with exactly this many latents", low=0)
    feedback: str | None = _fed(
        None, "what a latent receives (docs/feedback.md); otherwise the checkpoint's rule, or last"
    )
    replace_feedback: bool = _fed(
        False, "use feedback though the checkpoint was trained with another rule"
    )
    feedback_lr_multiplier: float = _fed(1.0, "rate of the rule's own weights, times lr", low=0)

    icot_tokens_per_epoch: float = _icot(8.0, "iCoT: chain tokens removed per epoch", low=0)
    icot_smoothing: float = _icot(4.0, "iCoT: rate of the random extra removal; 0 for none", low=0)
    icot_remove_all_after: int | None = _icot(
        None, "iCoT: once this many are removed, remove the whole chain", low=1
    )
    recall_sentences: int = _icot(
        30, "recall: sentences of the question to repeat", low=1, read_by=("recall",)
    )

    num_epochs: int = _update(
        1,
        "epochs of the whole schedule, skipped ones included",
        low=0,
        aliases=("num_train_epochs",),
    )
    batch_size_training: int = _update(
        32, "rows of a micro-batch, one process's", low=1, aliases=("per_device_train_batch_size",)
    )
    gradient_accumulation_steps: int = _update(
        1, "micro-batches of one update, of each process", low=1
    )
    lr: float = _update(1e-4, "learning rate of AdamW", low=0, aliases=("learning_rate",))
    lr_schedule: str = _update(
        "constant", "after the warm-up", choices=("constant", "linear", "cosine")
    )
    warmup_updates: int = _update(0, "updates of linear warm-up", low=0)
    weight_decay: float = _update(0.01, "decoupled weight decay, on every parameter", low=0)
    adam_beta2: float = _update(0.999, "AdamW's second beta; 0.99 forgets sooner", low=0, below=1)
    max_grad_norm: float = _update(0.0, "clip the gradient to this norm; 0: never", low=0)
    reset_optimizer: str = _update(
        "stage",
        "when AdamW's moments are cleared; the published True means epoch, False never",
        choices=("never", "stage", "epoch"),
        booleans=("never", "epoch"),
        read_by=BY_EPOCH,
    )
    gradient_checkpointing: bool = _update(
        False, "recompute block activations in the backward pass"
    )
    shard: bool = _update(
        False,
        "torch: spread weights, gradients and moments over the processes (FSDP)",
        read_by=CURRICULUM,
    )
    pad_multiple: int = _update(
        32, "lengths are padded to multiples of this, so few shapes occur", low=1, read_by=METHODS
    )
    lora: dict[str, Any] = _update(
        {},
        "train low-rank adapters beside a frozen base; the keys of `lora` below",
        read_by=METHODS,
    )

    eval_every: int = _ask(
        1, "epochs between evaluations; the last epoch is always evaluated", low=1, read_by=BY_EPOCH
    )
    eval_batch_size: int = _ask(
        64, "questions a batch in evaluation", low=1, aliases=("per_device_eval_batch_size",)
    )
    max_new_tokens: int | None = _ask(
        None,
        "longest answer; otherwise 64 if val_path contains gsm, else 128",
        low=1,
        read_by=CURRICULUM,
    )
    temperature: float = _ask(0.0, "sampling temperature of evaluation; 0 is greedy", low=0)
    swap_test: bool = _ask(
        True, "ProsQA: also ask for the other name, and count both right", read_by=CURRICULUM
    )

    save_only_improve: bool = _file(
        False, "keep only the best and the last checkpoint", read_by=BY_EPOCH
    )
    save_every: int = _file(
        0, "updates between checkpoints inside an epoch; 0: none", low=0, read_by=BY_EPOCH
    )
    keep_checkpoints: int = _file(0, "checkpoints kept, the newest; 0: all", low=0)
    log_every: int = _file(50, "updates between lines on the terminal; log.jsonl has all", low=1)
    report: bool = _file(True, "draw the curves into the run's report.html and .png as it trains")
    wandb: bool = _file(False, "also log to Weights & Biases", read_by=METHODS)

    dataset_name: str | None = _words(
        None, "latro, sft: a file of data/latro (docs/data_sets.md); gsm8k_8shot: examples first"
    )
    test_path: str | None = _words(None, "latro, sft: the test split; otherwise the data set's own")
    split: str = _words(
        "test",
        "what only_eval answers; a preexperiment reads train",
        choices=("test", "validation", "train"),
    )
    validation_items: int = _words(
        500, "items of train held out, where the set has no validation file of its own", low=1
    )
    split_seed: int = _words(
        0, "which items are held out; the run's own seed does not matter", low=0
    )
    chat_template: str = _words(
        "auto",
        "put questions into the tokenizer's chat template: if it has one, or always, or never",
        choices=("auto", "always", "never"),
    )
    prompt: str = _words(
        "auto",
        "which wording asks: to reason, as sft is trained, as published for evaluating sft; auto"
        " takes the method's",
        choices=("auto", "reason", "sft", "sft_published"),
    )
    response_length: int = _answers(
        200, "tokens of a rationale, and of an evaluation's output", low=1
    )
    stop_token: str = _words(
        "both", "what ends an output beside the end of a turn", choices=("eos", "pad", "both")
    )
    stop_token_ids: list[int] | None = _words(None, "replaces stop_token")
    pad_token: str | None = _words(
        None, "a token that is never written; otherwise the tokenizer's own, which must not be eos"
    )
    answer_rule: str = _answers(
        "corrected",
        "what accuracy counts; the other rule's score is reported beside it",
        choices=("corrected", "released"),
    )
    maj_k: int = _answers(
        0, "only_eval: samples of a majority vote beside the greedy answer", low=0
    )
    maj_temperature: float = _answers(1.0, "temperature of the votes", low=0)
    test_at_end: bool = _answers(
        False, "latro, sft: the best checkpoint answers the test split, once"
    )

    coconut: bool = _switch(False, "published switch for method: coconut")
    cot: bool = _switch(False, "published switch for method: cot")
    no_thoughts: bool = _switch(False, "published switch for method: no_thoughts")
    no_cot: bool = _switch(False, "published switch for method: no_cot")

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

    def problems(self) -> Iterable[str]:
        """What a method of its own class finds wrong."""
        return ()

    @property
    def adapter(self) -> Lora | None:
        """The keys under `lora` with their defaults; None trains every weight."""
        return None if not self.lora else read_lora(self.lora)[0]

    def to_yaml(self) -> str:
        """The resolved configuration as a file that loads to the same run."""
        resolved = {f.name: getattr(self, f.name) for f in fields(self)}
        # The switches repeat `method`; written out they could only contradict an override.
        for switch in PUBLISHED_SWITCHES:
            del resolved[switch]
        return yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)


PUBLISHED_SWITCHES = tuple(f.name for f in fields(RunConfig) if f.metadata["group"] == SWITCHES)
PUBLISHED_NAMES = {name: f.name for f in fields(RunConfig) for name in f.metadata["aliases"]}
"""LaTRO's published argument -> the key it stands for."""
