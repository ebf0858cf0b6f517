"""Evaluation on a data set: votes, predictions, summary, and the prompts it is asked with."""

from __future__ import annotations

import json

import pytest
from chat_tokenizers import TEMPLATES, chat_tokenizer
from golden_models import golden

from coconut.answering import majority
from coconut.config import check_config
from coconut.questions import Questions

LINES = golden("answers")["gsm8k_prompts"]["inputs"]


@pytest.mark.parametrize(
    ("votes", "answer"),
    [(["3", "4", "4"], "4"), (["3", "4"], "3"), (["", "", "5"], "5"), (["", ""], "")],
)
def test_most_votes_win_then_the_earliest_and_empty_ones_do_not_count(votes, answer):
    assert majority(votes) == answer


def config_of(tmp_path, dataset="gsm8k", inputs=LINES, **keys):
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in inputs))
    values = {"method": "latro", "only_eval": True, "dataset_name": dataset, "val_path": str(path)}
    values |= {"save_path": str(tmp_path / "runs"), "model_id": str(tmp_path)}
    return check_config(values | keys)


@pytest.mark.parametrize("dataset", ["gsm8k", "arc_challenge"])
@pytest.mark.parametrize("kind", ["no_chat_template", "chat_template"])
def test_prompts_and_responses_are_the_published_texts(tmp_path, dataset, kind):
    cases = golden("answers")["gsm8k_prompts" if dataset == "gsm8k" else "arc_prompts"]
    template = TEMPLATES["golden"] if kind == "chat_template" else None
    tokenizer = chat_tokenizer(tmp_path / "tokenizer", template)
    config = config_of(tmp_path, dataset, cases["inputs"])
    ours = Questions(config, tokenizer).items("test")
    for item, expected in zip(ours, cases[kind], strict=True):
        assert {name: item[name] for name in expected} == expected


def test_a_filled_template_has_one_bos_and_a_plain_prompt_too(tmp_path):
    for template in (TEMPLATES["llama"], TEMPLATES["mistral"], None):
        tokenizer = chat_tokenizer(tmp_path / "tokenizer", template)
        item = Questions(config_of(tmp_path), tokenizer).items("test")[0]
        assert item["query_ids"].count(tokenizer.token_id("<bos>")) == 1
