"""The likelihood of right answers without and with written rationales, against the slow oracle."""

from __future__ import annotations

import json

import naive
import numpy as np
import pytest
from conftest import CHOSEN, load_twin
from tiny import REPOSITORY, data_set_config

from coconut.checkpoints.source import open_source
from coconut.config.latro_keys import LatroConfig
from coconut.config.reading import check_config
from coconut.errors import UserError
from coconut.run.latro.preexperiment import measure
from coconut.text.tokenizer import Tokenizer

NATS = 1e-3
"""Largest gap of a summed log-probability to the oracle's, relative to 20 nats; seen: 3e-6."""


def preexperiment(folder, **keys) -> LatroConfig:
    made = data_set_config(folder, method="preexperiment", name="pre", **keys)
    assert isinstance(made, LatroConfig)
    return made


def run(twin, config: LatroConfig) -> tuple[dict, list[dict]]:
    summary = measure(config, twin.run.make_backend, twin.__name__)
    lines = (config.run_dir / "likelihoods.jsonl").read_text().splitlines()
    assert json.loads((config.run_dir / "summary.json").read_text()) == summary
    return summary, [json.loads(line) for line in lines]


def log_likelihood(model, context: list[int], target: list[int]) -> float:
    ids = [*context, *target]
    p = naive.softmax(naive.logits(model, ids, None))
    return sum(np.log(p[t - 1, ids[t]]) for t in range(len(context), len(ids)))


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_answers_are_scored_as_the_oracle_scores_them(twin, tmp_path, preset):
    """As released the span begins a token early and no separator stands before the answer."""
    config = preexperiment(tmp_path, preset=preset, rollout_batch_size=3)
    summary, rows = run(twin, config)
    tokenizer: Tokenizer = open_source(config).tokenizer
    model = naive.GPT2.load(tmp_path / "model")
    items = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    written = [i for i, item in enumerate(items) if "rationales" in item]
    assert [row["idx"] for row in rows] == written and 0 < len(written) < len(items)
    separator = "\n" if preset == "paper" else ""
    for row in rows:
        item = items[row["idx"]]
        prompt = tokenizer.encode_filled(
            "<|im_start|>system\nHelp.<|im_end|>\n<|im_start|>user\n"
            f"{item['question']}:<|im_end|>\n<|im_start|>assistant\n"
        )
        answer = [*tokenizer.encode(f"={item['groundtruth']}"), tokenizer.eos_id]
        for kind, rationale in (("without", ""), ("with", item["rationales"])):
            context = [*prompt, *tokenizer.encode(rationale + separator)]
            if preset == "released":
                target = [context[-1], *answer]
                expected = log_likelihood(model, context[:-1], target)
            else:
                expected = log_likelihood(model, context, answer)
            assert row[kind] == pytest.approx(expected, abs=NATS)
    assert summary["with"] == pytest.approx(np.mean([row["with"] for row in rows]))
    assert summary["n"] == len(rows)
    more = np.mean([row["with"] > row["without"] for row in rows])
    assert summary["likelier_with"] == pytest.approx(more)


def test_it_asks_all_of_train_and_says_when_nothing_is_to_be_compared(tmp_path):
    config = preexperiment(tmp_path)
    assert (config.split, config.only_eval) == ("train", True)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    bare = [line for line in lines if "rationales" not in line]
    (tmp_path / "train.jsonl").write_text("\n".join(bare))
    twin = load_twin(CHOSEN[0])
    with pytest.raises(UserError, match=r"train.jsonl: no item has a rationale"):
        measure(config, twin.run.make_backend, twin.__name__)
    assert not config.run_dir.exists()


def test_keys_of_training_are_refused_and_the_resolved_file_loads_again(tmp_path):
    with pytest.raises(UserError, match="rloo_k: preexperiment does not read it"):
        preexperiment(tmp_path, rloo_k=4)
    made = preexperiment(tmp_path, preset="released")
    import yaml

    assert check_config(yaml.safe_load(made.to_yaml())) == made


def test_the_run_that_ships_is_right(monkeypatch):
    from coconut.config.reading import load_config

    monkeypatch.chdir(REPOSITORY)
    config = load_config("args/latro_preexperiment_gsm8k.yaml")
    assert (config.method, config.dataset_name, config.split) == ("preexperiment", "gsm8k", "train")
