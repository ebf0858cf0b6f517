"""LatroConfig: the keys of `method: latro` and its pre-experiment, on top of those of every run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from coconut.config.keys import RunConfig
from coconut.config.values import key, shown

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

own = partial(key, group="Of `method: latro`", read_by=("latro",))
begun = partial(own, identity=True)
asks = partial(own, read_by=("latro", "preexperiment"))


def _but(name: str, default: Any, **said: Any) -> Any:
    """A key of every run with another default, and what else is said otherwise."""
    common = next(f for f in fields(RunConfig) if f.name == name)
    return field(default=default, metadata={**common.metadata, **said})


@dataclass
class LatroConfig(RunConfig):
    """A LaTRO run. Published names are kept; the defaults are the paper's."""

    lr: float = _but("lr", 5e-7)
    lr_schedule: str = _but("lr_schedule", "linear")
    weight_decay: float = _but("weight_decay", 0.0)
    batch_size_training: int = _but("batch_size_training", 4)
    gradient_accumulation_steps: int = _but("gradient_accumulation_steps", 12)
    num_epochs: int = _but("num_epochs", 6, help="epochs; epoch_counts says of what")
    eval_batch_size: int = _but("eval_batch_size", 20)
    temperature: float = _but(
        "temperature", 1.0, help="of the sampled rationales; also in their log-probability"
    )
    log_every: int = _but("log_every", 1)

    preset: str = asks(
        "paper", "paper, or what the released code does instead", choices=("paper", "released")
    )
    exp_name: str = asks("latro", "experiment; names the run unless run_name does")
    sanity_check: bool = asks(
        False, "keep only the first 1,000 items of every split", identity=True
    )
    checkpoint_path: str | None = begun(None, "checkpoint of a run to go on from")
    total_episodes: int | None = own(None, "rollouts in all; replaces num_epochs", low=1)
    total_updates: int | None = own(None, "updates in all; replaces both", low=0)
    epoch_counts: str = own(
        "prompts",
        "an epoch is a pass over all prompts, or as many rollouts as there are prompts",
        choices=("prompts", "rollouts"),
        released="rollouts",
    )
    num_evaluations: int = own(10, "evaluations spread over the training; 0: none", low=0)
    save_steps: float = own(0.0, "updates between checkpoints; below 1 a share of all", low=0)
    rollout_batch_size: int = asks(16, "rows sampled and scored at a time", low=1)
    rloo_k: int = own(16, "rationales a prompt", low=1)
    reward: str = own(
        "likelihood",
        "likelihood of the right answer; correct: whether the model's own is; mix of several; or a"
        " function that the data set has in REWARDS",
    )
    reward_weights: dict[str, Any] = own(
        {}, "what mix adds up, each by its weight; otherwise likelihood and correct by 1"
    )
    reward_clip: float = own(
        0.0, "keep rewards within this of 0, before penalties; 0: never", low=0
    )
    advantage_rule: str = own(
        "rloo",
        "over the siblings (rloo), their mean (dr_grpo) by their spread (grpo), or over what a"
        " greedy rationale earns (remax)",
        choices=("rloo", "grpo", "dr_grpo", "remax"),
    )
    kl_coef: float = own(0.05, "weight of the KL to the reference; kl_in says where", low=0)
    kl_in: str = own(
        "reward",
        "the log-ratio (k1) a part of the reward, or k3 of every token one of the loss",
        choices=("reward", "loss"),
    )
    reference_every: int = own(
        0, "updates after which the model of now becomes the reference; 0: never", low=0
    )
    num_iterations: int = own(
        1, "optimizer updates on the same rationales, with clipped ratios if above 1", low=1
    )
    clip_epsilon: float = own(
        0.2, "ratios are clipped this far below 1, and above", above=0, below=1
    )
    clip_epsilon_high: float | None = own(None, "how far above instead", above=0)
    ratio_level: str = own(
        "token",
        "a ratio for each token, or for the rationale: the product, or the geometric mean, of its"
        " tokens'",
        choices=("token", "sequence", "sequence_mean"),
    )
    length_norm: str = own(
        "none",
        "a rationale's terms are summed over its tokens; or also divided by its length, by the mean"
        " length of the batch, or by response_length",
        choices=("none", "row", "batch", "constant"),
    )
    entropy_coef: float = own(0.0, "weight of the entropy of sampled tokens, a bonus", low=0)
    sft_penalty: float = own(
        1.0, "weight of the answer's own log-likelihood in the loss", low=0, released=0.0
    )
    non_stop_penalty: bool = own(True, "worsen the reward of rationales that do not end")
    penalty_reward_value: float = own(2.0, "size of that penalty; penalty_mode says how", low=0)
    penalty_mode: str = own(
        "constant",
        "so many nats less; or this times the group's mean if that is less; or times the mean of"
        " all rows; or mask: they teach nothing instead",
        choices=("constant", "group_mean", "batch_mean", "mask"),
        released="batch_mean",
    )
    stop_seqs: list[str] = begun(list(STOP_SEQS), "texts that end a rationale", any_text=True)
    stop_matching: str = begun(
        "text",
        "find stop_seqs in the text, or as exactly their own tokens",
        choices=("text", "ids"),
        released="ids",
    )
    include_stop: bool = begun(True, "the policy is trained to end as well", released=False)
    separator: str = asks(
        "\n",
        "between rationale and answer, instead of trailing white space",
        any_text=True,
        released="",
        identity=True,
    )
    reward_offset: int = asks(
        0,
        "-1: the reward begins a token early, as released",
        choices=(0, -1),
        released=-1,
        identity=True,
    )
    latro_latents: int = begun(
        0, "thoughts before each rationale; trained through both terms", low=0
    )
    warm_start_updates: int = begun(0, "supervised updates on items with rationales first", low=0)
    warm_start_lr: float = begun(1e-3, "their learning rate", low=0)
    warm_start_items: int | None = begun(None, "of the items with rationales, only so many", low=1)
    warm_start_batch: int = begun(32, "their rows an update", low=1)
    evaluation_items: int = own(200, "validation items an evaluation asks", low=2)
    rationale_check: bool = own(
        False, "only_eval: answer again after its own, another question's and no rationale"
    )
    dataset_num_proc: int = own(4, "published; preparing the data takes no processes here")

    @property
    def rewards(self) -> dict[str, float]:
        """Weight of each reward that counts."""
        if self.reward == "mix":
            return self.reward_weights or {"likelihood": 1.0, "correct": 1.0}
        return {self.reward: 1.0}

    @property
    def writes_answers(self) -> bool:
        """Whether the policy goes on to an answer of its own, which some reward reads."""
        return set(self.rewards) != {"likelihood"}

    @property
    def has_surrogate(self) -> bool:
        """Whether the loss has terms besides the published two."""
        k3 = self.kl_in == "loss" and self.kl_coef > 0
        return self.num_iterations > 1 or self.entropy_coef > 0 or k3

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

    def problems(self) -> Iterator[str]:
        """What is wrong with the keys of a LaTRO run, alone and together."""
        if self.rationale_check and not self.only_eval:
            yield "rationale_check: is of an evaluation; set only_eval: True"
        if any(not s for s in self.stop_seqs):
            yield "stop_seqs: an empty text would end every rationale at once"
        if self.only_eval:
            return
        yield from self._objective_problems()
        if self.rloo_k < 2 and self.advantage_rule != "remax":
            yield "rloo_k: must be at least 2: a single sample has no siblings to compare"
        elif self.local_batch % self.rloo_k:
            yield (
                f"rloo_k: {self.batch_size_training} rows x {self.gradient_accumulation_steps}"
                f" micro-batches make {self.local_batch} rollouts an update, which must be a"
                f" multiple of rloo_k ({self.rloo_k}); change batch_size_training or"
                " gradient_accumulation_steps"
            )
        if self.num_epochs == 0 and self.total_episodes is None and self.total_updates is None:
            yield "num_epochs: 0 trains nothing; for a warm start alone set total_updates: 0"
        if self.feedback and not self.latro_latents:
            yield "feedback: nothing is fed back without thoughts; set latro_latents too"
        if self.adapter and self.adapter.dropout:
            yield "lora.dropout: rationales are scored as they were drawn, without; remove it"
        if self.temperature == 0:
            yield "temperature: rationales are sampled; it must be above 0"

    def _objective_problems(self) -> Iterator[str]:
        """What is wrong with reward, penalty, KL and ratio together."""
        if self.reward_weights and self.reward != "mix":
            yield "reward_weights: only reward: mix adds several up"
        for name, weight in self.reward_weights.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                yield f"reward_weights.{name}: expected a number, got {shown(weight)}"
        if self.writes_answers and not self.include_stop:
            yield (
                f"include_stop: False trains no token behind the rationale, but reward:"
                f" {self.reward} judges the answer there; set it to True"
            )
        if self.non_stop_penalty and self.penalty_mode.endswith("_mean") and self.writes_answers:
            yield (
                f"penalty_mode: {self.penalty_mode} multiplies a mean, which worsens only"
                " log-likelihoods; set constant or mask"
            )
        if self.reference_every and not self.kl_coef:
            yield "reference_every: without a KL term there is no reference; set kl_coef"
        for f in fields(self) if self.num_iterations == 1 else ():
            if f.name.startswith(("clip_", "ratio_")) and getattr(self, f.name) != f.default:
                yield f"{f.name}: ratios are 1 in the only update; raise num_iterations"
        if self.ratio_level == "sequence_mean" and self.length_norm == "row":
            yield "length_norm: sequence_mean divides by the rationale's length already; set none"


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {
        f.name: v for f in fields(LatroConfig) if (v := f.metadata["released"]) is not None
    },
}
"""Where the released code differs from the paper (and from what its authors say it does)."""


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
