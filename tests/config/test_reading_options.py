"""`--key value`, as the published scripts are called, stands for `key=value`."""

from __future__ import annotations

from pathlib import Path

import pytest

from coconut.config.latro_keys import LatroConfig
from coconut.config.others import INSTEAD, LATRO
from coconut.config.reading import from_options, load_config
from coconut.errors import UserError

REPOSITORY = Path(__file__).parents[2]
TRAINING = (
    "--exp_name mine --run_name mine-1 --sanity_check --model_name_or_path someone/model"
    " --total_episodes 960 --num_evaluations 6 --per_device_eval_batch_size 20"
    " --rollout_batch_size 48 --response_length 500 --stop_token both --stop_token_ids 1 2"
    " --stop_seqs Answer: #### --temperature 1 --learning_rate 1e-6 --penalty_reward_value 2"
    " --no_non_stop_penalty --kl_coef 0.25 --rloo_k 12 --sft_penalty 0 --dataset_name gsm8k"
    " --dataset_num_proc 4 --per_device_train_batch_size 8 --gradient_accumulation_steps=6"
    " --num_train_epochs 3 --lr_scheduler_type linear --save_strategy steps --save_steps 0.1"
    " --output_dir out --bf16 True --gradient_checkpointing --seed 3 --logging_steps 1"
    " --report_to none --adam_beta2 0.99 --weight_decay 0.0 --max_grad_norm 1.0"
    " --eval_strategy steps --attn_implementation flash_attention_2"
)
"""Arguments of the published training script, and what it inherits that its launchers set."""


def test_a_published_training_command_is_taken_as_it_is():
    made = load_config(
        REPOSITORY / "args/latro_gsm8k.yaml", from_options(["a.yaml", *TRAINING.split()])[1:]
    )
    assert isinstance(made, LatroConfig)
    assert (made.lr, made.name, made.save_path) == (1e-6, "mine-1", "out")
    assert (made.sanity_check, made.non_stop_penalty, made.gradient_checkpointing) == (1, 0, 1)
    assert made.stop_token_ids == [1, 2] and made.stop_seqs == ["Answer:", "####"]
    assert (made.local_batch, made.num_epochs, made.kl_coef) == (48, 3, 0.25)


def test_published_evaluation_and_sft_commands_are_taken_as_they_are():
    evaluation = (
        "--base_model_name_or_path someone/model --eval_model_name_or_path data/checkpoints/prosqa"
        " --dataset_name gsm8k_0shot --eval_batch_size 64 --response_length 500 --temperature 0.7"
        " --seed 42 --stop_token eos --stop_token_ids 5"
    )
    sft = (
        "--model_name_or_path someone/model --dataset_name arc_challenge --num_train_epochs 12"
        " --per_device_train_batch_size 16 --gradient_accumulation_steps 2 --learning_rate 1e-7"
        " --save_strategy epoch --evaluation_strategy epoch --load_best_model_at_end --bf16"
        " --output_dir out --seed 42"
    )
    files = ("latro_gsm8k_eval", "sft_arc_challenge")
    for file, words in zip(files, (evaluation, sft), strict=True):
        path = str(REPOSITORY / f"args/{file}.yaml")
        assert load_config(path, from_options([path, *words.split()])[1:]).seed == 42


def test_words_become_keys_and_the_commands_own_options_stay():
    words = ["--check", "a.yaml", "lr=1", "--bf16", "seed=2", "--check", "--stop-token", "eos"]
    assert from_options(words, ["--check"]) == [
        "--check", "a.yaml", "lr=1", "bf16=True", "seed=2", "--check", 'stop_token="eos"',
    ]  # fmt: skip
    assert from_options(["a.yaml", "--no_cot", "--weight_decay", "-1"]) == [
        "a.yaml", "no_cot=True", "weight_decay=-1",
    ]  # fmt: skip
    assert from_options(["a.yaml", "--stop_seqs", "####"])[1] == 'stop_seqs=["####"]'
    assert from_options(["a.yaml", "--stop_seqs", "Answer: ", "a # b"])[1] == (
        'stop_seqs=["Answer: ", "a # b"]'
    )


@pytest.mark.parametrize("name", sorted({**INSTEAD, **LATRO, "evaluation_strategy": 0}))
def test_what_is_not_taken_is_answered(name):
    path = REPOSITORY / "args/latro_gsm8k.yaml"
    if name in LatroConfig.__dataclass_fields__:
        return
    with pytest.raises(UserError, match=f"{name}: ."):
        load_config(path, [f"{name}=another"])
