"""RunConfig: the keys of a run. A key's default, help, limits and readers stand in its field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from coconut.config.lora_keys import Lora, _lora
from coconut.config.values import key

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


LATENT_GROWTH = ("stage", "one")
TRACKERS = ("none", "wandb", "trackio", "tensorboard")


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
    wandb: bool = key(False, "the same as report_to: wandb")
    report_to: str = key("none", "tracker that gets the run's numbers too", choices=TRACKERS)
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
        # Switches repeat another key; written out they could only contradict an override.
        for switch in (*PUBLISHED_SWITCHES, "wandb"):
            del resolved[switch]
        return yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
