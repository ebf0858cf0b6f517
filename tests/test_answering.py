"""Evaluation on a data set: votes, predictions, summary, and the prompts it is asked with."""

from __future__ import annotations

import json

import pytest
from chat_tokenizers import TEMPLATES, chat_tokenizer
from conftest import CHOSEN, load_twin
from golden_models import golden
from tiny import data_set_config

from coconut.answering import evaluate_data_set, majority
from coconut.config import check_config
from coconut.questions import Questions
from data.latro import chains

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
    values = {"method": "latro", "only_eval": True, "dataset_name": dataset, "test_path": str(path)}
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


def evaluated(name: str, folder, **keys) -> tuple[dict, list[dict]]:
    """(summary, predictions) of an evaluation by one twin."""
    twin = load_twin(name)
    config = data_set_config(folder, only_eval=True, name=name, **({"method": "latro"} | keys))
    summary = evaluate_data_set(config, twin.run.make_backend, twin.__name__)
    assert json.loads((config.run_dir / "summary.json").read_text()) == summary
    lines = (config.run_dir / "predictions.jsonl").read_text().splitlines()
    return summary, [json.loads(line) for line in lines]


@pytest.fixture
def whole_outputs(monkeypatch):
    """Every text is an answer, so that a random model gives different ones."""
    monkeypatch.setattr(chains, "answer", lambda output, item: repr(output))


def test_greedy_answers_and_votes_are_those_of_the_other_twin(tmp_path, whole_outputs):
    found = [evaluated(name, tmp_path, maj_k=3) for name in CHOSEN]
    assert all(predictions == found[0][1] for _, predictions in found)
    for summary, predictions in found:
        assert len(predictions) == summary["n"] == 6
        assert len({p["output"] for p in predictions}) > 1
        said = {name: summary[name] for name in ("temperature", "maj_temperature", "maj_k", "seed")}
        assert said == {"temperature": 0, "maj_temperature": 1, "maj_k": 3, "seed": 0}
        assert (summary["device"], summary["dtype"]) == ("cpu", "float32")
        assert summary["peak_memory_bytes"] > 0 and summary["chat_template"] is True


def test_samples_of_a_question_do_not_depend_on_the_batch(tmp_path, whole_outputs):
    """Two questions' samples share a batch here, and one question's are spread over several."""
    found = [evaluated(CHOSEN[0], tmp_path, maj_k=4, eval_batch_size=n)[1] for n in (3, 64)]
    assert found[0] == found[1]
    assert any(len(set(p["votes"])) > 1 for p in found[0])


def test_a_temperature_samples_the_answers_themselves(tmp_path):
    greedy, hot = (evaluated(CHOSEN[0], tmp_path, **keys)[1] for keys in ({}, {"temperature": 1.0}))
    assert [p["output"] for p in greedy] != [p["output"] for p in hot]
