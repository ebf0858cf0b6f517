"""LatroConfig: the keys of `method: latro` and its pre-experiment, on top of those of every run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from coconut.config.checks import not_default, not_read
from coconut.config.keys import CURRICULUM_KEYS, RunConfig
from coconut.config.values import key

STOP_SEQS = (
    *("Answer:", " Answer:", "\nAnswer:"),
    *("The answer is", " The answer is", "\nThe answer is"),
    *("The answer is:", " The answer is:", "\nThe answer is:"),
    *(" the answer is", "so the final answer is", "So, the answer is"),
    "Therefore, the answer is",
    *("The function call is:", "\nThe function call is:"),
    *("The function call is", "\nThe function call is", "the function call is"),
)
"""The published stop strings; those of a function call come from a task that was not published."""

PENALTIES = ("constant", "group_mean", "batch_mean")
"""What an unfinished rationale's reward becomes; `penalised` says how."""

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {
        "sft_penalty": 0.0,
        "reward_offset": -1,
        "include_stop": False,
        "separator": "",
        "stop_matching": "ids",
        "penalty_mode": "batch_mean",
        "epoch_counts": "rollouts",
    },
}
"""Where the released code differs from the paper (and from what its authors say it does)."""

UNUSED = (
    *CURRICULUM_KEYS,
    *("resume", "eval_every", "save_every", "reset_optimizer", "save_only_improve"),
)
"""Keys of Coconut's curriculum and loop, which a LaTRO run does not read."""
PREEXPERIMENT = (
    *("method", "project", "save_path", "name", "exp_name", "seed", "only_eval", "model_id"),
    *("load_model_path", "model_revision", "tokenizer", "bf16", "pad_multiple", "debug", "wandb"),
    "report_to",
    *("dataset_name", "train_path", "val_path", "test_path", "split", "split_seed"),
    "validation_items",
    *("chat_template", "prompt", "stop_token", "stop_token_ids", "pad_token", "preset"),
    *("separator", "reward_offset", "rollout_batch_size", "sanity_check", "lora"),
)
"""All that a pre-experiment reads."""


@dataclass
class LatroConfig(RunConfig):
    """A LaTRO run. Published names are kept; the defaults are the paper's."""

    lr: float = key(5e-7, "learning rate of AdamW", low=0)
    lr_schedule: str = key("linear", "after the warm-up", choices=("constant", "linear", "cosine"))
    weight_decay: float = key(0.0, "decoupled weight decay, on every parameter", low=0)
    batch_size_training: int = key(4, "rows of a micro-batch", low=1)
    gradient_accumulation_steps: int = key(12, "micro-batches of one update", low=1)
    num_epochs: int = key(6, "epochs; epoch_counts says of what", low=0)
    eval_batch_size: int = key(20, "questions a batch in evaluation", low=1)
    temperature: float = key(1.0, "of the sampled rationales; also in their log-probability", low=0)
    log_every: int = key(1, "updates between lines on the terminal; log.jsonl has all", low=1)

    preset: str = key(
        "paper", "paper, or what the released code does instead", choices=tuple(PRESETS)
    )
    exp_name: str = key("latro", "experiment; names the run unless run_name does")
    sanity_check: bool = key(False, "keep only the first 1,000 items of every split")
    checkpoint_path: str | None = key(None, "checkpoint of a run to go on from")
    total_episodes: int | None = key(None, "rollouts in all; replaces num_epochs", low=1)
    total_updates: int | None = key(None, "updates in all; replaces both", low=0)
    epoch_counts: str = key(
        "prompts",
        "an epoch is a pass over all prompts, or as many rollouts as there are prompts",
        choices=("prompts", "rollouts"),
    )
    num_evaluations: int = key(10, "evaluations spread over the training; 0: none", low=0)
    save_steps: float = key(0.0, "updates between checkpoints; below 1 a share of all", low=0)
    rollout_batch_size: int = key(16, "rows sampled and scored at a time", low=1)
    rloo_k: int = key(16, "rationales a prompt", low=1)
    kl_coef: float = key(0.05, "weight of the log-ratio to the reference in the reward", low=0)
    sft_penalty: float = key(1.0, "weight of the answer's own log-likelihood in the loss", low=0)
    non_stop_penalty: bool = key(True, "worsen the reward of rationales that do not end")
    penalty_reward_value: float = key(2.0, "size of that penalty; penalty_mode says how", low=0)
    penalty_mode: str = key(
        "constant",
        "so many nats less; or this times the group's mean if that is less; or times the mean of"
        " all rows",
        choices=PENALTIES,
    )
    stop_seqs: list[str] = key(list(STOP_SEQS), "texts that end a rationale", any_text=True)
    stop_matching: str = key(
        "text",
        "find stop_seqs in the text, or as exactly their own tokens",
        choices=("text", "ids"),
    )
    include_stop: bool = key(True, "the policy is trained to end as well")
    separator: str = key(
        "\n", "between rationale and answer, instead of trailing white space", any_text=True
    )
    reward_offset: int = key(0, "-1: the reward begins a token early, as released")
    latro_latents: int = key(0, "thoughts before each rationale; trained through both terms", low=0)
    warm_start_updates: int = key(0, "supervised updates on items with rationales first", low=0)
    warm_start_lr: float = key(1e-3, "their learning rate", low=0)
    warm_start_items: int | None = key(None, "of the items with rationales, only so many", low=1)
    warm_start_batch: int = key(32, "their rows an update", low=1)
    evaluation_items: int = key(200, "validation items an evaluation asks", low=2)
    rationale_check: bool = key(
        False, "only_eval: answer again after its own, another question's and no rationale"
    )
    dataset_num_proc: int = key(4, "published; preparing the data takes no processes here")

    @property
    def local_batch(self) -> int:
        """Rollouts of an update."""
        return self.batch_size_training * self.gradient_accumulation_steps

    @property
    def n_prompts(self) -> int:
        """Prompts of an update."""
        return self.local_batch // self.rloo_k

    @property
    def has_latents(self) -> bool:
        """Whether rows hold the markers and latent positions."""
        return self.latro_latents > 0

    def n_updates(self, n_items: int) -> int:
        """Updates of the whole run over so many prompts."""
        if self.total_updates is not None:
            return self.total_updates
        if self.total_episodes is not None:
            return math.ceil(self.total_episodes / self.local_batch)
        per_update = self.n_prompts if self.epoch_counts == "prompts" else self.local_batch
        return math.ceil(self.num_epochs * n_items / per_update)

    def problems(self, given: Mapping[Any, Any]) -> list[str]:
        """What is wrong with the keys of a LaTRO run, alone and together."""
        preset = PRESETS.get(self.preset, {})
        unread: tuple[str, ...] = UNUSED
        if self.method == "preexperiment":
            unread = tuple(f.name for f in fields(self) if f.name not in (*PREEXPERIMENT, *preset))
        found = not_read(self, not_default(given, unread, type(self)))
        if self.rationale_check and not self.only_eval:
            found.append("rationale_check: is of an evaluation; set only_eval: True")
        if self.reward_offset not in (0, -1):
            found.append(f"reward_offset: 0 or -1, got {self.reward_offset}")
        if any(not s for s in self.stop_seqs):
            found.append("stop_seqs: an empty text would end every rationale at once")
        if self.only_eval:
            return found
        if self.rloo_k < 2:
            found.append("rloo_k: must be at least 2: a single sample has no siblings to compare")
        elif self.local_batch % self.rloo_k:
            found.append(
                f"rloo_k: {self.batch_size_training} rows x {self.gradient_accumulation_steps}"
                f" micro-batches make {self.local_batch} rollouts an update, which must be a"
                f" multiple of rloo_k ({self.rloo_k}); change batch_size_training or"
                " gradient_accumulation_steps"
            )
        if self.num_epochs == 0 and self.total_episodes is None and self.total_updates is None:
            found.append(
                "num_epochs: 0 trains nothing; for a warm start alone set total_updates: 0"
            )
        if self.feedback and not self.latro_latents:
            found.append("feedback: nothing is fed back without thoughts; set latro_latents too")
        if self.adapter and self.adapter.dropout:
            found.append(
                "lora.dropout: rationales are scored as they were drawn, without; remove it"
            )
        if self.temperature == 0:
            found.append("temperature: rationales are sampled; it must be above 0")
        return found


def with_preset(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """The values with those of their preset and method where they say nothing themselves."""
    preset, method = values.get("preset", "paper"), values["method"]
    merged = {**(PRESETS.get(preset, {}) if isinstance(preset, str) else {}), **values}
    if method == "preexperiment":
        merged = {"split": "train", **merged, "only_eval": True}
    elif merged.get("only_eval") is True:
        merged.setdefault("temperature", 0.0)  # rationales are sampled, answers are not
    if "name" not in merged and "run_name" not in merged:
        merged["name"] = f"{merged.get('exp_name', method)}__{merged.get('seed', 0)}"
    return merged
