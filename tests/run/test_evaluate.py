"""Evaluation: what is asked, in which order answers come back, and what is counted."""

from __future__ import annotations

import json
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import few
from tiny import random_gpt2, read_log, run_config, start

from coconut.backend import LossSum, StepStats
from coconut.batches.batch import collate
from coconut.batches.curriculum import markers_of, question_row
from coconut.batches.dataset import read_items, tokenize
from coconut.run.curriculum_loop import Runner
from coconut.run.evaluate import evaluate
from coconut.tasks import prosqa, prosqa_graph
from coconut.text.opening import load_tokenizer
from coconut.world import World


class Answers:
    """A back end that says what `answer` makes of a question's text, and keeps the batches."""

    name = device = dtype = model_type = "answers"
    note, n_params, n_positions, mixes_rows = "", 1, None, False

    def __init__(self, tokenizer, answer):
        self.tokenizer, self.answer = tokenizer, answer
        self.batches, self.decodings, self.n_measured = [], [], []

    def generate(self, batch, decoding, n_measured):
        self.batches.append(batch)
        self.decodings.append(decoding)
        self.n_measured.append(n_measured)
        new = []
        for ids, mask in zip(batch.ids, batch.mask, strict=True):
            text = self.answer(self.tokenizer.decode(ids[mask].tolist()))
            tokens = [*self.tokenizer.encode(text), decoding.eos_id]
            new.append(tokens[: decoding.max_new_tokens])
        return new

    def memory(self):
        return {"peak_memory_bytes": 123}

    def thought_statistics(self):
        return {}


@pytest.fixture
def items():
    options = prosqa_graph.Options(nodes=16, max_hops=4)
    return list(prosqa.generate(options, 7, 12, 0, frozenset()))


def judge(tmp_path, items, answer, stage=9, swap=False, **keys):
    """(Evaluation, back end) of items on which `answer(question)` is said."""
    config = run_config(tmp_path, max_new_tokens=200, **keys)
    tokenizer = load_tokenizer("prosqa")
    if config.method == "coconut":
        tokenizer = tokenizer.with_latents()
    backend = Answers(tokenizer, answer)
    swapped = None
    if swap:
        others = [prosqa.swap(item) for item in items]
        swapped = (others, tokenize(others, tokenizer, "swapped"))
    samples = tokenize(items, tokenizer, "items")
    seen = []
    run = SimpleNamespace(backend=backend, config=config, tokenizer=tokenizer, world=World())
    result = evaluate(run, items, samples, stage, swapped, advance=seen.append)
    assert sum(seen) == len(items) * (1 + swap)
    return result, backend


def answer_of(items, chain=False, also=lambda item: True):
    """What a model says that knows the answers of these items, or of those that `also` names."""

    def say(question):
        for item in items:
            if question.startswith(item["question"]):
                steps = "".join(step + "\n" for step in item["steps"]) if chain else ""
                return steps + "### " + (item["answer"] if also(item) else "I do not know.")
        raise AssertionError(question)

    return say


def test_predictions_are_in_the_datas_order_whatever_the_batches(tmp_path, items):
    lengths = [len(item["question"]) for item in items]
    assert lengths != sorted(lengths)
    result, backend = judge(tmp_path, items, answer_of(items), eval_batch_size=5)
    assert [p["idx"] for p in result.predictions] == list(range(12))
    assert [p["gold"] for p in result.predictions] == [item["answer"] for item in items]
    assert all(p["correct"] for p in result.predictions)
    assert [len(batch.ids) for batch in backend.batches] == [5, 5, 2]
    # Like lengths share a batch.
    widths = [batch.mask.sum(axis=1) for batch in backend.batches]
    assert all(a.max() <= b.min() for a, b in pairwise(widths))


def test_summary_counts_what_the_predictions_say(tmp_path, items):
    right = {item["answer"] for item in items[:9]}
    result, _ = judge(
        tmp_path, items, answer_of(items, also=lambda item: item["answer"] in right), stage=9
    )
    s, n = result.summary, sum(item["answer"] in right for item in items)
    assert 0 < n < 12
    assert s["accuracy"] == n / 12 == np.mean([p["correct"] for p in result.predictions])
    assert s["standard_error"] == pytest.approx(np.sqrt(n / 12 * (1 - n / 12) / 12))
    assert s["n"] == 12 and s["stage"] == 9 and s["peak_memory_bytes"] == 123
    new = [p["new_tokens"] for p in result.predictions]
    assert s["new_tokens_per_question"] == sum(new) / 12
    assert s["unfinished"] == 0.0
    assert s["samples_per_second"] == pytest.approx(12 / s["seconds"])
    assert s["n_latents"] == [1, 1]
    for p in result.predictions:
        assert p["prompt_tokens"] > 10 and p["output"].startswith("### ")


def test_an_answer_cut_short_counts_as_unfinished(tmp_path, items):
    def say(question):
        return "x" * 500

    result, _ = judge(tmp_path, items, say)
    assert result.summary["unfinished"] == 1.0
    assert result.summary["accuracy"] == 0.0
    assert all(p["answer"] == "" and not p["ended"] for p in result.predictions)


def test_chain_is_compared_with_the_steps_left_at_the_stage(tmp_path, items):
    for stage, whole in ((0, True), (1, False)):
        chain = [i if whole else i | {"steps": i["steps"][1:]} for i in items]
        result, _ = judge(tmp_path, items, answer_of(chain, chain=True), stage=stage)
        assert result.summary["cot_match"] == result.summary["accuracy"] == 1.0
    result, _ = judge(tmp_path, items, answer_of(items, chain=True), stage=1)
    assert result.summary["cot_match"] == 0.0
    assert result.summary["accuracy"] == 1.0


def test_where_all_steps_are_latents_no_chain_is_counted(tmp_path, items):
    result, _ = judge(tmp_path, items, answer_of(items, chain=False), stage=99)
    assert result.summary["accuracy"] == 1.0
    assert (result.summary["cot_match"], result.summary["chains"]) == (None, 0)
    assert all(p["cot_match"] is None for p in result.predictions)


# ---- the swap test


def test_both_right_needs_the_question_and_its_swapped_form(tmp_path, items):
    others = [prosqa.swap(item) for item in items]
    knows_all, _ = judge(tmp_path, items, answer_of([*items, *others]), swap=True)
    s = knows_all.summary
    assert (s["accuracy"], s["swapped_accuracy"], s["both_accuracy"]) == (1.0, 1.0, 1.0)

    half = {item["answer"] for item in items}
    knows_one = answer_of([*items, *others], also=lambda item: item["answer"] in half)
    result, _ = judge(tmp_path, items, knows_one, swap=True)
    s = result.summary
    assert s["accuracy"] == 1.0
    assert s["both_accuracy"] == s["swapped_accuracy"] < 1.0
    for p, other in zip(result.predictions, others, strict=True):
        assert p["swapped_correct"] == (p["swapped_answer"] == other["answer"])

    right = {item["answer"] for item in items[:6]} | {item["answer"] for item in others[3:9]}
    result, _ = judge(
        tmp_path,
        items,
        answer_of([*items, *others], also=lambda i: i["answer"] in right),
        swap=True,
    )
    p = result.predictions
    both = np.mean([x["correct"] and x["swapped_correct"] for x in p])
    assert result.summary["both_accuracy"] == both
    assert both < min(result.summary["accuracy"], result.summary["swapped_accuracy"])


@pytest.mark.slow
def test_runs_swap_prosqa_alone_and_only_if_asked(twin, tmp_path):
    config = run_config(tmp_path)
    for name, keys in (("swapped", {}), ("plain", {"swap_test": False})):
        start(twin, config := run_config(tmp_path, name=name, **keys)).train()
        summary = json.loads((config.run_dir / "summary.json").read_text())
        assert ("both_accuracy" in summary) == (name == "swapped")
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"question": "1+1?", "steps": ["<<1+1=2>>"], "answer": "2"}]))
    config = run_config(tmp_path, name="other", val_path=str(other))
    start(twin, config).train()
    assert "both_accuracy" not in json.loads((config.run_dir / "summary.json").read_text())


# ---- outcome classes


def test_whole_chains_are_classed_by_their_path(tmp_path, items):
    result, _ = judge(tmp_path, items, answer_of(items, chain=True), stage=0)
    assert result.summary["outcomes"] == {"Correct Path": 12}
    assert {p["outcome"] for p in result.predictions} == {"Correct Path"}

    def invents(question):
        return "Every impus is a zumpus.\n### Tom is a worpus."

    result, _ = judge(tmp_path, items, invents, stage=0)
    assert result.summary["outcomes"] == {"Hallucination": 12}
    assert sum(result.summary["outcomes"].values()) == 12


def test_chains_with_hidden_steps_or_without_a_graph_have_no_class(tmp_path, items):
    result, _ = judge(tmp_path, items, answer_of(items), stage=1)
    assert "outcomes" not in result.summary
    plain = [{k: item[k] for k in ("question", "steps", "answer")} for item in items]
    result, _ = judge(tmp_path, plain, answer_of(plain, chain=True), stage=0)
    assert "outcomes" not in result.summary


# ---- latents


@pytest.mark.parametrize("n_latents", [0, 1, 5])
def test_forced_latents_replace_the_stages(tmp_path, items, n_latents):
    keys = {"only_eval": True, "load_model_path": str(tmp_path), "n_latents": n_latents}
    result, backend = judge(tmp_path, items, answer_of(items), **keys)
    latent = backend.tokenizer.latent_id
    for batch in backend.batches:
        assert batch.n_passes == n_latents
        assert ((batch.ids == latent).sum(axis=1) == n_latents).all()
    assert result.summary["n_latents"] == [n_latents, n_latents]


def test_questions_hold_what_training_rows_hold_before_their_labels(tmp_path, items):
    _, backend = judge(
        tmp_path,
        items,
        answer_of(items),
        stage=2,
        max_latent_stage=9,
        pad_latent_to_max=False,
        c_thought=2,
        eval_batch_size=64,
    )
    (batch,) = backend.batches
    config = run_config(
        tmp_path, max_latent_stage=9, pad_latent_to_max=False, c_thought=2, max_new_tokens=200
    )
    tokenizer = backend.tokenizer
    samples = tokenize(items, tokenizer, "items")
    by_length = sorted(samples, key=lambda sample: len(sample.question))
    rows = [question_row(config, sample, 2, markers_of(tokenizer)) for sample in by_length]
    np.testing.assert_array_equal(batch.ids, collate(rows, tokenizer.pad_id).ids)
    assert all(row.n_latents == 4 for row in rows)


def test_decoding_follows_the_configuration(tmp_path, items):
    _, backend = judge(tmp_path, items, answer_of(items), temperature=0.7, seed=3)
    (decoding,) = backend.decodings
    assert (decoding.temperature, decoding.seed, decoding.max_new_tokens) == (0.7, 3, 200)
    assert decoding.eos_id == backend.tokenizer.eos_id


# ---- from a run


class Learned(Answers):
    """Answers that a Runner can train: it knows every validation answer from the third update."""

    def __init__(self, config, source):
        self.n_updates = 0
        tokenizer = load_tokenizer("prosqa").with_latents()
        items = read_items(config.val_path)
        both = [*items, *(prosqa.swap(item) for item in items)]
        super().__init__(tokenizer, answer_of(both, also=lambda item: self.n_updates >= 3))

    def compiled_in_words(self):
        return ""

    def train_step(self, micro_batches, lr, dropout_key, progress):
        self.n_updates += 1
        return StepStats(1.0, 1, 1.0)

    def eval_loss(self, batch):
        return LossSum(3.0 * batch.n_targets, batch.n_targets)

    def gathered(self):
        return nullcontext()

    def reset_optimizer(self):
        pass

    def save(self, directory, with_optimizer):
        (directory / "config.json").write_text('{"model_type": "gpt2"}')


def test_a_run_evaluates_when_due_and_keeps_best_and_newest(tmp_path):
    config = run_config(
        tmp_path, num_epochs=5, eval_every=2, save_only_improve=True, max_new_tokens=100
    )
    Runner(config, Learned, "learned").train()
    evaluations = read_log(config, "eval")
    assert [e["epoch"] for e in evaluations] == [2, 4, 5]
    assert [e["answer"]["n"] for e in evaluations] == [0, 4, 4]
    assert [e["both"]["share"] for e in evaluations] == [0.0, 1.0, 1.0]
    assert [e["loss"] for e in evaluations] == [3.0] * 3
    # The fourth was the first at its best.
    kept = sorted(path.name for path in config.run_dir.glob("epoch_*"))
    assert kept == ["epoch_04", "epoch_05"]
    summary = json.loads((config.run_dir / "summary.json").read_text())
    wanted = "accuracy cot_match n seconds samples_per_second new_tokens_per_question"
    wanted += " peak_memory_bytes backend device dtype checkpoint data data_sha256 stage epoch"
    assert set(wanted.split()) <= set(summary)
    assert (summary["epoch"], summary["loss"], summary["backend"]) == (5, 3.0, "learned")
    assert len(summary["data_sha256"]) == 64
    lines = (config.run_dir / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["idx"] for line in lines] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("keys", "stage"), few([({"stage": 2}, 2), ({"resume": 7}, 3), ({}, 1)], 1)
)
def test_stage_of_an_evaluation(twin, tmp_path, keys, stage):
    trained = run_config(tmp_path, name="trained", epochs_per_stage=2, num_epochs=3, eval_every=9)
    start(twin, trained).train()
    keys = {"epochs_per_stage": 2} | keys
    config = run_config(
        tmp_path,
        only_eval=True,
        load_model_path=str(trained.run_dir / "epoch_03"),
        model_config_path=None,
        tokenizer=None,
        max_latent_stage=3,
        **keys,
    )
    result = start(twin, config).evaluate_once()
    assert result.summary["stage"] == stage
    assert result.summary["n_latents"] == [stage, stage]


def test_one_long_question_takes_no_room_from_the_others(twin, tmp_path, capsys):
    """Room for an answer is each row's own; what was cut is counted and said."""
    short = [{"question": f"{n}+{n}=", "steps": [], "answer": str(2 * n)} for n in range(4)]
    long = {"question": "1+" * 24 + "1=", "steps": [], "answer": "25"}
    random_gpt2(tmp_path / "model", 257, 16, n_positions=60, std=0.6)

    def evaluated(name, items):
        (tmp_path / f"{name}.json").write_text(json.dumps(items))
        keys = {"method": "cot", "only_eval": True, "model_id": str(tmp_path / "model")}
        keys |= {"val_path": str(tmp_path / f"{name}.json"), "model_config_path": None}
        keys |= {"tokenizer": "bytes", "max_new_tokens": 20, "name": name}
        result = start(twin, run_config(tmp_path, **keys)).evaluate_once()
        (event,) = read_log(run_config(tmp_path, **keys), "eval")
        return result, event.get("out_of_positions"), capsys.readouterr().out

    alone, none, said = evaluated("alone", short)
    assert (none, alone.summary["out_of_positions"]) == (None, 0) and "cut" not in said
    mixed, counted, said = evaluated("mixed", [*short[:2], long, *short[2:]])
    assert "note: answers cut where the model's 60 positions end: 1 " in said
    assert counted == mixed.summary["out_of_positions"] == 1
    cut = mixed.predictions.pop(2)
    assert cut["out_of_positions"] and cut["new_tokens"] == 60 - cut["prompt_tokens"] == 9
    assert [p["output"] for p in mixed.predictions] == [p["output"] for p in alone.predictions]
    assert {p["new_tokens"] for p in mixed.predictions} == {20}


# ---- what a question and its swapped form have in common


@pytest.mark.parametrize("mixes_rows", [False, True])
def test_a_question_and_its_swapped_form_share_a_batch_unless_rows_read_each_other(
    tmp_path, items, monkeypatch, mixes_rows
):
    monkeypatch.setattr(Answers, "mixes_rows", mixes_rows)
    others = [prosqa.swap(item) for item in items]
    result, backend = judge(
        tmp_path, items, answer_of([*items, *others]), swap=True, eval_batch_size=8
    )
    assert result.summary["both_accuracy"] == 1.0
    sizes = [len(batch.ids) for batch in backend.batches]
    if mixes_rows:
        assert sizes == [8, 4, 8, 4]
        assert all(batch.beginning is None for batch in backend.batches)
    else:
        assert sizes == [8, 8, 8]
        assert [len(batch.beginning.first) for batch in backend.batches] == [4, 4, 4]
        assert backend.n_measured == [4, 4, 4]
