"""RunConfig: the keys of a run. All that is said of a key stands in its field."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from coconut.config.lora_keys import Lora, read_lora
from coconut.config.methods import (
    CURRICULUM,
    DATASET_METHODS,
    EPOCHS,
    METHODS,
    TRAINED,
    WITH_FEEDBACK,
    WITH_LATENTS,
    WITH_STAGE,
)
from coconut.config.values import key
from coconut.world import DEVICES

LATENT_GROWTH = ("stage", "one")
TRACKERS = ("none", "wandb", "trackio", "tensorboard")
SWITCHES = "Published switches"

# Kinds of keys: the heading that they stand under, and who reads them where not all methods do.
run = partial(key, group="The run")
what = partial(run, identity=True)
model = partial(key, group="Model", identity=True)
data = partial(key, group="Data", identity=True)
row = partial(key, group="Stages and latents", read_by=WITH_STAGE, identity=True)
latent = partial(row, read_by=WITH_LATENTS)
fed = partial(row, read_by=WITH_FEEDBACK)
icot = partial(key, group="Of single methods", read_by=("icot",), identity=True)
fit = partial(key, group="Updates", read_by=TRAINED)
ask = partial(key, group="Evaluation", read_by=TRAINED)
test = partial(ask, read_by=CURRICULUM)
file = partial(key, group="Files and lines", read_by=TRAINED)
text = partial(key, group="Questions with rationales in words", read_by=DATASET_METHODS)
put = partial(text, identity=True)
reply = partial(text, read_by=("latro", "sft"))
switch = partial(key, group=SWITCHES)


@dataclass
class RunConfig:
    """One run. What the published code has too keeps its name and meaning."""

    project: str = run("coconut", "project name for the tracker")
    save_path: str = run("runs", "folder that holds the run directories", aliases="output_dir")
    name: str = run("run", "name of the run; its directory is save_path/name", aliases="run_name")
    seed: int = what(0, "seed of weights, order, curriculum draws and dropout", low=0)
    method: str | None = what(None, "what to train; replaces the four switches", choices=METHODS)
    only_eval: bool = run(False, "evaluate load_model_path (or model_id) once and stop")
    resume: int = what(
        0, "epochs of the schedule to skip; selects the stage it starts with", low=0, read_by=EPOCHS
    )
    resume_changed: bool = run(
        False,
        "go on from the run's checkpoint though keys that say what it is have changed; model and"
        " tokenizer stay the checkpoint's",
        read_by=TRAINED,
    )
    debug: bool = what(False, "5,000 training and 32 validation items, no checkpoint, no tracker")

    model_id: str | None = model(
        None,
        "Hugging Face model, or a directory in its layout; a config.json: random weights",
        aliases="base_model_name_or_path model_name_or_path",
    )
    model_revision: str | None = model(
        None, "branch, tag or commit of model_id on the hub; otherwise its main branch"
    )
    model_config_path: str | None = model(
        None, "config.json of a model to start from random weights", read_by=TRAINED
    )
    load_model_path: str | None = model(
        None, "checkpoint to start from or to evaluate", aliases="eval_model_name_or_path"
    )
    tokenizer: str | None = model(
        None, "gpt2, prosqa, bytes, or a tokenizer directory; otherwise the model's own"
    )
    bf16: bool = model(
        False, "compute in bfloat16; weights and optimizer stay float32", identity=False
    )
    tf32: bool = model(
        False,
        "let a GPU round float32 products to TF32, 10 bits instead of 23: faster",
        identity=False,
    )
    device: str | None = model(
        None,
        "cpu or gpu; otherwise what COCONUT_DEVICE says, or a GPU if there is one",
        choices=DEVICES,
        identity=False,
    )

    train_path: str | None = data(None, "training data, JSON or JSON lines (see data/README.md)")
    val_path: str | None = data(None, "validation data, JSON or JSON lines")
    max_size: int | None = data(
        None, "train on the first so many items only", low=1, read_by=CURRICULUM
    )
    generate: dict[str, Any] = data(
        {}, "training data made as it is needed; the keys of `generate` below", read_by=CURRICULUM
    )

    c_thought: int = latent(1, "latents that replace one step", low=0)
    epochs_per_stage: int = row(
        3,
        "epochs before the next step is dropped",
        low=1,
        read_by=("coconut", "pause_as_thought", "no_thoughts"),
    )
    max_latent_stage: int = row(3, "last stage that adds latents; later ones drop all steps", low=0)
    pad_latent_to_max: bool = latent(
        True, "give every row the stage's latents, however few its steps"
    )
    latent_growth: str = row(
        "stage",
        "add c_thought latents with each stage, or one at a time",
        choices=LATENT_GROWTH,
        read_by=("coconut", "pause_as_thought"),
    )
    uniform_prob: float = row(
        0.0,
        "chance that a row's stage is redrawn from 0..its steps",
        low=0,
        high=1,
        complaint="a probability, at most 1",
    )
    stage_mixing: str = row(
        "none",
        "draw stage i <= k with weight i+1 at stage k, per item or one for each micro-batch",
        choices=("none", "item", "batch"),
    )
    stage: int | None = row(
        None, "evaluate at this stage, whatever resume says", low=0, identity=False
    )
    n_latents: int | None = latent(
        None, "evaluate with exactly this many latents", low=0, identity=False
    )
    feedback: str | None = fed(
        None,
        "what a latent receives (docs/feedback.md); otherwise the checkpoint's rule, or last",
        aliases="replacement_method",
    )
    replace_feedback: bool = fed(
        False, "use feedback though the checkpoint was trained with another rule"
    )
    feedback_lr_multiplier: float = fed(
        1.0, "rate of the rule's own weights, times lr", low=0, identity=False
    )

    icot_tokens_per_epoch: float = icot(8.0, "iCoT: chain tokens removed per epoch", low=0)
    icot_smoothing: float = icot(4.0, "iCoT: rate of the random extra removal; 0 for none", low=0)
    icot_remove_all_after: int | None = icot(
        None, "iCoT: once this many are removed, remove the whole chain", low=1
    )
    recall_sentences: int = icot(
        30, "recall: sentences of the question to repeat", low=1, read_by=("recall",)
    )

    num_epochs: int = fit(
        1,
        "epochs of the whole schedule, skipped ones included",
        low=0,
        high=10_000,
        aliases="num_train_epochs",
    )
    batch_size_training: int = fit(
        32, "rows of a micro-batch, one process's", low=1, aliases="per_device_train_batch_size"
    )
    gradient_accumulation_steps: int = fit(1, "micro-batches of one update, of each process", low=1)
    lr: float = fit(1e-4, "learning rate of AdamW", low=0, aliases="learning_rate")
    lr_schedule: str = fit(
        "constant",
        "after the warm-up",
        choices=("constant", "linear", "cosine"),
        synonyms={"constant_with_warmup": "constant"},
        aliases="lr_scheduler_type",
    )
    warmup_updates: int = fit(0, "updates of linear warm-up", low=0, aliases="warmup_steps")
    weight_decay: float = fit(0.01, "decoupled weight decay, on every parameter", low=0)
    adam_beta2: float = fit(0.999, "AdamW's second beta; 0.99 forgets sooner", low=0, below=1)
    max_grad_norm: float = fit(
        0.0, "clip the gradient to this norm; 0: never", low=0, aliases="grad_clip"
    )
    reset_optimizer: str = fit(
        "stage",
        "when AdamW's moments are cleared; the published True means epoch, False never",
        choices=("never", "stage", "epoch"),
        booleans=("never", "epoch"),
        read_by=EPOCHS,
    )
    gradient_checkpointing: bool = fit(False, "recompute block activations in the backward pass")
    shard: bool = fit(
        False,
        "torch: spread weights, gradients and moments over the processes (FSDP)",
        read_by=CURRICULUM,
    )
    pad_multiple: int = fit(
        32, "lengths are padded to multiples of this, so few shapes occur", low=1, read_by=None
    )
    lora: dict[str, Any] = fit(
        {},
        "train low-rank adapters beside a frozen base; the keys of `lora` below",
        read_by=None,
        identity=True,
    )

    eval_every: int = ask(
        1, "epochs between evaluations; the last epoch is always evaluated", low=1, read_by=EPOCHS
    )
    eval_batch_size: int = ask(
        64, "questions a batch in evaluation", low=1, aliases="per_device_eval_batch_size"
    )
    max_new_tokens: int | None = test(
        None, "longest answer; otherwise 64 if val_path contains gsm, else 128", low=1
    )
    temperature: float = ask(0.0, "sampling temperature of evaluation; 0 is greedy", low=0)
    swap_test: bool = test(True, "ProsQA: also ask for the other name, and count both right")
    measure_thoughts: bool = test(True, "say in a summary what thoughts look like")

    save_only_improve: bool = file(
        False, "keep only the best and the last checkpoint", read_by=EPOCHS
    )
    save_every: int = file(
        0, "updates between checkpoints inside an epoch; 0: none", low=0, read_by=EPOCHS
    )
    keep_checkpoints: int = file(
        0, "checkpoints kept, the newest; 0: all", low=0, aliases="save_total_limit"
    )
    log_every: int = file(
        50,
        "updates between lines on the terminal; log.jsonl has all",
        low=1,
        aliases="logging_steps",
    )
    report: bool = file(True, "draw the curves into the run's report.html and .png as it trains")
    wandb: bool = file(False, "the same as report_to: wandb", read_by=None)
    report_to: str = file(
        "none", "tracker that gets the run's numbers too", choices=TRACKERS, read_by=None
    )

    dataset_name: str | None = put(
        None,
        "latro, sft: a name or a file (docs/data_sets.md); gsm8k_8shot puts examples first",
    )
    test_path: str | None = put(None, "latro, sft: the test split; otherwise the data set's own")
    split: str = text(
        "test",
        "what only_eval answers; a preexperiment reads train",
        choices=("test", "validation", "train"),
    )
    validation_items: int = put(
        500, "items of train held out, where the set has no validation file of its own", low=1
    )
    split_seed: int = put(0, "which items are held out; the run's own seed does not matter", low=0)
    chat_template: str = put(
        "auto",
        "put questions into the tokenizer's chat template: if it has one, or always, or never",
        choices=("auto", "always", "never"),
    )
    prompt: str = put(
        "auto",
        "which wording asks: to reason, as sft is trained, as published for evaluating sft; auto"
        " takes the method's",
        choices=("auto", "reason", "sft", "sft_published"),
    )
    response_length: int = reply(200, "tokens of a rationale, and of an evaluation's output", low=1)
    stop_token: str = put(
        "both", "what ends an output beside the end of a turn", choices=("eos", "pad", "both")
    )
    stop_token_ids: list[int] | None = put(None, "replaces stop_token")
    pad_token: str | None = put(
        None, "a token that is never written; otherwise the tokenizer's own, which must not be eos"
    )
    answer_rule: str = reply(
        "corrected",
        "what accuracy counts; the other rule's score is reported beside it",
        choices=("corrected", "released"),
    )
    maj_k: int = reply(0, "only_eval: samples of a majority vote beside the greedy answer", low=0)
    maj_temperature: float = reply(1.0, "temperature of the votes", low=0)
    test_at_end: bool = reply(False, "latro, sft: the best checkpoint answers the test split, once")

    coconut: bool = switch(False, "published switch for method: coconut")
    cot: bool = switch(False, "published switch for method: cot")
    no_thoughts: bool = switch(False, "published switch for method: no_thoughts")
    no_cot: bool = switch(False, "published switch for method: no_cot")

    where = "configuration"
    """What a message about a key names: the file it was read from."""
    notes = tuple[str, ...]()
    """What is to be said of keys that change nothing here, and of files that are not there yet."""

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
        for name in NOT_KEPT:
            del resolved[name]
        return yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)


PUBLISHED_SWITCHES = tuple(f.name for f in fields(RunConfig) if f.metadata["group"] == SWITCHES)
NOT_KEPT = (*PUBLISHED_SWITCHES, "wandb", "resume_changed")
"""What config.yaml leaves out: switches repeat another key, so that written out they could only
contradict an override; and what was allowed once is asked again."""
PUBLISHED_NAMES = {
    name: f.name for f in fields(RunConfig) for name in f.metadata["aliases"].split()
}
"""A name that other programs have for a key -> the key."""
