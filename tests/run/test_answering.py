"""Evaluation on a data set: votes, predictions, summary, and the prompts it is asked with."""

from __future__ import annotations

import json

import naive
import numpy as np
import pytest
from chat_tokenizers import TEMPLATES, chat_tokenizer
from conftest import CHOSEN, load_twin
from golden_models import golden
from tiny import chat_model, data_set_config

from coconut.batches.questions import Questions
from coconut.checkpoints.source import open_source
from coconut.config.reading import check_config
from coconut.errors import UserError
from coconut.run.answering import evaluate_data_set, majority
from coconut.tasks.questions import chains

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


@pytest.mark.slow
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


def test_the_answer_is_asked_again_after_own_shuffled_and_no_rationale(twin, tmp_path, monkeypatch):
    keys = {"method": "latro", "only_eval": True, "rationale_check": True, "name": "check"}
    config = data_set_config(tmp_path, **keys)
    asked, make = [], twin.run.make_backend

    def watched(config, source, world=None):
        backend = make(config, source, world)
        sample = backend.sample

        def noting(batch, decoding, rows, streams):
            ids = [row[real].tolist() for row, real in zip(batch.ids, batch.mask, strict=True)]
            asked.append((decoding.max_new_tokens, dict(zip(batch.idx.tolist(), ids, strict=True))))
            return sample(batch, decoding, rows, streams)

        backend.sample = noting
        return backend

    summary = evaluate_data_set(config, watched, twin.__name__)
    questions = Questions(config, open_source(config).tokenizer)
    encode, items = questions.tokenizer.encode, questions.items("test")
    lines = (config.run_dir / "predictions.jsonl").read_text().splitlines()
    said = [json.loads(line)["new_tokens"] for line in lines]
    (_, prompts), (n, own), (_, shuffled), (_, empty) = asked
    assert n == 3  # an equals sign, a digit, the end
    assert all(ids == item["query_ids"] for item, ids in zip(items, prompts.values(), strict=True))
    model = naive.GPT2.load(tmp_path / "model")
    rewards = {"own": [], "shuffled": [], "empty": []}
    for item in items:
        prompt, i = item["query_ids"], item["idx"]
        rationale = own[i][len(prompt) : -len(encode("\n="))]
        assert 0 < len(rationale) <= said[i] == 6
        assert empty[i] == [*prompt, *encode("\n=")]
        next_prompt = items[(i + 1) % 6]["query_ids"]
        assert shuffled[i] == [*prompt, *own[(i + 1) % 6][len(next_prompt) :]]
        for kind, rows in (("own", own), ("shuffled", shuffled), ("empty", empty)):
            ids = [*rows[i][:-1], *item["response_ids"]]
            p = naive.softmax(naive.logits(model, ids, None))
            scored = range(len(rows[i]) - 1, len(ids))
            rewards[kind].append(sum(np.log(p[t - 1, ids[t]]) for t in scored))
    for kind, expected in rewards.items():
        # 1e-3 of some 20 nats a row; seen: 4e-6.
        assert summary["rationales"][kind]["reward"] == pytest.approx(np.mean(expected), abs=1e-3)
    assert len({f["reward"] for f in summary["rationales"].values()}) == 3


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"rationale_check": True, "only_eval": False}, "rationale_check: is of an evaluation"),
        ({"maj_k": 3, "only_eval": False}, "maj_k: a vote is of an evaluation"),
        ({"method": "sft", "rationale_check": True}, "rationale_check: unknown key"),
    ],
)
def test_what_only_an_evaluation_does_is_refused_elsewhere(tmp_path, keys, complaint):
    with pytest.raises(UserError, match=complaint):
        data_set_config(tmp_path, **({"method": "latro", "only_eval": True} | keys))


@pytest.mark.parametrize(
    ("n_items", "n_positions", "complaint"),
    [
        (1, 512, "at least two questions"),
        (6, 60, "item 0: .* take 45 of the model's 60 positions.* from 20 to 14"),
    ],
)
def test_a_check_without_room_is_refused_before_anything_is_written(
    tmp_path, n_items, n_positions, complaint
):
    chat_model(tmp_path / "model", n_positions=n_positions)
    keys = {"method": "latro", "only_eval": True, "rationale_check": True, "response_length": 20}
    config = data_set_config(tmp_path, **keys)
    test = tmp_path / "test.jsonl"
    test.write_text("".join(test.read_text().splitlines(keepends=True)[:n_items]))
    with pytest.raises(UserError, match=complaint):
        evaluate_data_set(config, None, "mlx_coconut")
    assert not config.run_dir.exists()


def test_outputs_end_at_their_own_last_position_and_are_counted(tmp_path, twin, capsys):
    chat_model(tmp_path / "model", n_positions=70)
    keys = {"only_eval": True, "method": "latro", "response_length": 20}
    keys |= {"maj_k": 2, "maj_temperature": 1e-3}
    config = data_set_config(tmp_path, **keys)
    lines = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    lines[1]["question"] += " 1" * 7
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = evaluate_data_set(config, twin.run.make_backend, twin.__name__)
    lines = (config.run_dir / "predictions.jsonl").read_text().splitlines()
    _, cut, *others = predictions = [json.loads(line) for line in lines]
    # The greedy output and both samples.
    assert cut["out_of_positions"] and summary["out_of_positions"] == 3
    assert cut["new_tokens"] == 70 - cut["prompt_tokens"] < 20
    assert "positions end: 3" in capsys.readouterr().out
    assert {p["new_tokens"] for p in others} == {20} and not predictions[0]["out_of_positions"]
