"""Inside a thought: every shown quantity against the slow oracle, on both twins."""

from __future__ import annotations

import io
import json
import math
import re
from itertools import pairwise
from pathlib import Path

import naive
import numpy as np
import pytest
from conftest import CHOSEN, few, load_twin
from golden_models import MODELS, TOKENS, as_row, to_numpy
from lenses import ANSWER, QUESTION, TOKENIZERS, open_lens, write_checkpoint

from coconut.batches.batch import collate
from coconut.blocks import recorded_attention
from coconut.errors import UserError
from coconut.inside import forced
from coconut.inside.graph import read_graph
from coconut.inside.inspect import main
from coconut.inside.known import warnings
from coconut.inside.show import Tables
from coconut.text.answers import extract

# Behind each tolerance the largest gap seen on x86-64.
LOGPROBS = 1e-4  # nats; 6e-6
PROBABILITY = 1e-5  # 3e-7
LENGTH = 1e-4  # 4e-6

KINDS = list(TOKENIZERS)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("lenses")
    return {kind: write_checkpoint(folder / kind, kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def directory(request, checkpoints) -> Path:
    """A checkpoint; its name is the kind of its tokenizer."""
    return checkpoints[request.param]


def prompt(lens, k: int, behind: str = "") -> list[int]:
    t = lens.tokenizer
    ids = [*t.encode(QUESTION + "\n"), t.start_id, *[t.latent_id] * k, t.end_id]
    return [*ids, *t.encode(behind)]


def oracle_logprobs(lens, ids: list[int]) -> np.ndarray:
    """(T, V) nats of each token behind each position."""
    model = naive.GPT2.load(lens.directory)
    return np.log(naive.softmax(naive.logits(model, ids, lens.tokenizer.latent_id)))


def oracle_probability(lens, ids: list[int], n_last: int) -> float:
    """Probability of the last tokens of a text given those before."""
    logprobs = oracle_logprobs(lens, ids)
    return math.exp(sum(logprobs[t - 1, ids[t]] for t in range(len(ids) - n_last, len(ids))))


# ---- thoughts


def test_read_outs_norms_and_similarities_are_the_oracles(twin, directory):
    lens = open_lens(twin, directory)
    _, thoughts = lens.thoughts(QUESTION, n_top=5)
    model, ids = naive.GPT2.load(directory), prompt(lens, 3)
    x = naive.inputs_with_thoughts(model, ids, lens.tokenizer.latent_id)
    first = ids.index(lens.tokenizer.latent_id)
    vectors = x[first : first + 3]
    lengths = np.linalg.norm(vectors, axis=1)
    mean = np.linalg.norm(model.weights["wte.weight"], axis=1).mean()
    assert [t.number for t in thoughts] == [1, 2, 3]
    for i, thought in enumerate(thoughts):
        p = naive.softmax(model.head(vectors[i : i + 1]))[0]
        top = np.argsort(-p)[:5]
        assert [text for text, _ in thought.top] == [lens.spell(int(t)) for t in top]
        assert [q for _, q in thought.top] == pytest.approx(p[top].tolist(), abs=PROBABILITY)
        assert thought.norm == pytest.approx(lengths[i], rel=LENGTH)
        assert thought.norm_ratio == pytest.approx(lengths[i] / mean, rel=LENGTH)
        cosines = [vectors[i] @ vectors[j] / lengths[i] / lengths[j] for j in range(i)]
        assert thought.cosines == pytest.approx(cosines, abs=LENGTH)


def test_attention_is_the_oracles_summed_over_each_sentence(twin, directory, monkeypatch):
    lens = open_lens(twin, directory)
    segments, thoughts = lens.thoughts(QUESTION)
    model, ids = naive.GPT2.load(directory), prompt(lens, 3)
    x = naive.inputs_with_thoughts(model, ids, lens.tokenizer.latent_id)
    calls: list[np.ndarray] = []
    softmax = naive.softmax
    monkeypatch.setattr(naive, "softmax", lambda s: calls.append(softmax(s)) or calls[-1])
    model.trunk(x)
    weights = np.array(calls).reshape(model.n_layer, model.n_head, len(ids), len(ids))
    sentences = [*QUESTION.replace("? ", "?|").replace(". ", ".|").split("|")]
    assert segments == [*sentences, "<|start-latent|>", "thought 1", "thought 2", "thought 3"]
    # Sentence by sentence: each with the space before it, the last with its newline.
    pieces = [f"{s} " for s in sentences[:-1]] + [sentences[-1] + "\n"]
    if directory.name == "pairs":
        pieces = [sentences[0], *(f" {s}" for s in sentences[1:-1]), f" {sentences[-1]}\n"]
    counts = [len(lens.tokenizer.encode(piece)) for piece in pieces] + [1] * 4
    edges = np.cumsum([0, *counts])
    assert edges[-1] == len(ids) - 1
    first = ids.index(lens.tokenizer.latent_id)
    for i, thought in enumerate(thoughts):
        expected = np.stack(
            [weights[:, :, first + i, a:b].sum(axis=2) for a, b in pairwise(edges)], axis=2
        )
        assert np.abs(np.array(thought.attention_heads) - expected).max() < PROBABILITY
        assert thought.attention == pytest.approx(expected.mean(axis=(0, 1)), abs=PROBABILITY)
        assert thought.attention_max == pytest.approx(expected.max(axis=(0, 1)), abs=PROBABILITY)
        for s, (layer, head) in enumerate(thought.attention_at):
            best = expected[:, :, s].max()
            assert expected[layer, head, s] == pytest.approx(best, abs=PROBABILITY)
        assert sum(thought.attention) == pytest.approx(1, abs=PROBABILITY)


def test_recording_attention_changes_no_output_and_ends_with_the_block(twin):
    inspect = twin.look_inside
    model, _, _ = twin.weights.load_model(MODELS / "gpt2-tiny")
    batch = collate(
        [as_row(0, [5, 6, 7, TOKENS["start"], TOKENS["latent"], TOKENS["end"]], None)], 0
    )
    inputs = twin.latent.Inputs.of(batch)
    plain = twin.latent.latent_forward(model, inputs, batch.first_latent, 1)
    with recorded_attention() as record:
        recorded = twin.latent.latent_forward(model, inputs, batch.first_latent, 1)
    assert len(record) == 2 * len(model.layers)
    inspect.continuation_logprobs(model, batch, 1, [[[3, 4]]])
    assert len(record) == 2 * len(model.layers)
    np.testing.assert_array_equal(to_numpy(plain.hidden), to_numpy(recorded.hidden))


# ---- what would be said after k thoughts


def test_answers_after_k_thoughts_are_the_oracles(twin, directory):
    lens = open_lens(twin, directory)
    graph = read_graph(QUESTION)
    stops = lens.stops(QUESTION, graph, ANSWER, max_new_tokens=6)
    model, tokenizer = naive.GPT2.load(directory), lens.tokenizer
    assert [stop.n_thoughts for stop in stops] == [0, 1, 2, 3]
    for k, stop in enumerate(stops):
        ids = prompt(lens, k)
        new = naive.generate(model, ids, tokenizer.latent_id, tokenizer.eos_id, 6)
        assert stop.text == tokenizer.decode(new)
        assert (stop.answer, "\n".join(stop.chain).strip()) == extract(stop.text)
        assert stop.is_finished == (new[-1] == tokenizer.eos_id)
        for choice, found in zip(("zumpus", "rempus"), stop.choices, strict=True):
            answer = tokenizer.encode(f"### Tom is a {choice}.")
            expected = oracle_probability(lens, ids + answer, len(answer))
            assert math.log(found) == pytest.approx(math.log(expected), abs=LOGPROBS)


def test_certainty_is_the_probability_of_the_answer_behind_its_sign(twin, directory, monkeypatch):
    lens = open_lens(twin, directory)
    tokenizer = lens.tokenizer
    new = [*tokenizer.encode("Every wumpus is a lempus.\n### Tom is"), tokenizer.eos_id]
    before = [i for i in range(len(new)) if tokenizer.decode(new[:i]).strip().endswith("###")]
    # `### ` is one token in the small encoding; in the other the space is part of the answer.
    n_answer = len(new) - before[0]
    monkeypatch.setattr(lens.backend, "generate", lambda batch, _: [new] * len(batch.ids))
    stops = lens.stops(QUESTION, read_graph(QUESTION), "Tom is")
    for k, stop in enumerate(stops):
        expected = oracle_probability(lens, prompt(lens, k) + new, n_answer)
        assert stop.certainty == pytest.approx(expected, rel=LENGTH)
        assert (stop.answer, stop.is_correct, stop.is_finished) == ("Tom is", True, True)
        assert (stop.chain, stop.chain_is_stated) == (["Every wumpus is a lempus."], [True])


@pytest.mark.parametrize("text", ["Tom is", "Every wumpus is a lempus.\n### "])
def test_where_there_is_no_answer_there_is_no_certainty(twin, directory, monkeypatch, text):
    lens = open_lens(twin, directory)
    new = lens.tokenizer.encode(text)
    monkeypatch.setattr(lens.backend, "generate", lambda batch, _: [new] * len(batch.ids))
    stop = lens.stops(QUESTION, None, None)[0]
    assert (stop.answer, stop.certainty, stop.is_correct, stop.choices) == ("", None, None, None)


# ---- the latent tree


def tree_oracle(lens, k: int, lead: str, word: str, tail: str) -> float:
    """Probability of a word behind a lead, from the definition and the kind of tokenizer."""
    tokenizer = lens.tokenizer
    ids = prompt(lens, k)
    if lens.directory.name == "pairs" or not lead:
        # The lead is tokens of its own: the product of the word's.
        forced = tokenizer.encode(lead)
        word_ids = tokenizer.encode(f" {word}" if lead else word)
        return oracle_probability(lens, ids + forced + word_ids, len(word_ids))
    # One token says `Every X`, or ` is a X` behind the name: its share among all that begin so.
    before, shared = ("", "Every") if lead == "Every" else (lead.removesuffix(" is a"), " is a")
    logprobs = oracle_logprobs(lens, ids + tokenizer.encode(before))[-1]
    same, all_of_lead = 0.0, 0.0
    for token in range(tokenizer.vocab_size):
        text = tokenizer.decode([token])
        if text.startswith(shared):
            all_of_lead += math.exp(logprobs[token])
            if text.removeprefix(f"{shared} ").split(" ")[0].strip(".\n") == word:
                same += math.exp(logprobs[token])
    return same / all_of_lead


@pytest.mark.parametrize("kind", few(["step", "fact", "answer"], 1))
def test_tree_values_are_the_oracles(twin, directory, kind):
    lens, graph = open_lens(twin, directory), read_graph(QUESTION)
    reading = lens.reading(QUESTION, graph, kind)
    lead = {"step": "Every", "fact": "Tom is a", "answer": "### Tom is a"}[kind]
    names = {"Tom", "Sam"}
    for k, values in enumerate(reading.values):
        first_step = kind == "step" and k == 0
        assert reading.leads[k] == ("" if first_step else lead)
        for word, found in zip(graph.nodes, values, strict=True):
            if (word in names) == first_step:
                expected = tree_oracle(lens, k, reading.leads[k], word, "")
                assert found == pytest.approx(expected, rel=1e-3, abs=1e-9), (k, word)
            else:
                assert found == 0


def test_what_a_thought_names_is_the_oracles(twin, directory):
    lens, graph = open_lens(twin, directory), read_graph(QUESTION)
    reading = lens.reading(QUESTION, graph, "thought")
    assert reading.values[0] == [0] * len(graph.nodes)
    ids = prompt(lens, lens.n_thoughts)
    start = ids.index(lens.tokenizer.start_id)
    logprobs = oracle_logprobs(lens, ids)
    texts = [lens.tokenizer.decode([i]) for i in range(lens.tokenizer.vocab_size)]
    for k, values in enumerate(reading.values[1:]):
        for word, found in zip(graph.nodes, values, strict=True):
            if word in {"Tom", "Sam"}:
                assert found == 0
                continue
            whole = [i for i, t in enumerate(texts) if re.match(rf" is a {word}\b", t)]
            if not whole:  # GPT-2's pairs: ` is`, ` a`, then the word
                tokens = lens.tokenizer.encode(f" is a {word}.")
                whole = [tokens[[texts[t] for t in tokens].index(" a") + 1]]
            expected = sum(math.exp(logprobs[start + k][i]) for i in whole)
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-9), (k, word)


def test_lead_probability_is_the_oracles(twin, directory):
    lens, graph = open_lens(twin, directory), read_graph(QUESTION)
    for kind, lead in (("step", "Every"), ("fact", "Tom is a")):
        reading = lens.reading(QUESTION, graph, kind)
        ids = prompt(lens, 2)
        if directory.name == "pairs":
            tokens = lens.tokenizer.encode(lead)
            expected = oracle_probability(lens, ids + tokens, len(tokens))
        else:
            before, shared = ("", "Every") if kind == "step" else ("Tom", " is a")
            tokens = lens.tokenizer.encode(before)
            expected = oracle_probability(lens, ids + tokens, len(tokens)) if tokens else 1
            logprobs = oracle_logprobs(lens, ids + tokens)[-1]
            vocabulary = [lens.tokenizer.decode([i]) for i in range(lens.tokenizer.vocab_size)]
            expected *= sum(
                math.exp(logprobs[i]) for i, t in enumerate(vocabulary) if t.startswith(shared)
            )
        assert reading.lead_probability[2] == pytest.approx(expected, rel=1e-3)


def test_values_of_all_words_behind_a_shared_lead_add_up_to_one(twin, checkpoints):
    lens = open_lens(twin, checkpoints["statements"])
    words = [lens.tokenizer.decode([i]) for i in range(lens.tokenizer.vocab_size)]
    concepts = sorted({w.split()[1] for w in words if w.startswith("Every ")})
    question = " ".join(f"Tom is a {c}." for c in concepts) + f" Is Tom a {concepts[0]} or wumpus?"
    reading = lens.reading(question, read_graph(question), "step")
    assert [sum(row) for row in reading.values[1:]] == pytest.approx([1, 1, 1], abs=PROBABILITY)


def test_a_word_the_small_encoding_does_not_know_is_read_byte_by_byte(twin, checkpoints):
    lens = open_lens(twin, checkpoints["statements"])
    question = QUESTION.replace("jompus", "zebra")
    graph = read_graph(question)
    reading = lens.reading(question, graph, "step")
    p = [oracle for oracle in reading.values[2]]
    ids = prompt(lens, 2)
    tokens = lens.tokenizer.encode(question + "\n")
    ids = [*tokens, *ids[ids.index(lens.tokenizer.start_id) :]]
    spelled = lens.tokenizer.encode("Every zebra")
    assert len(spelled) == len("Every zebra")
    joint = oracle_probability(lens, ids + spelled, len(spelled))
    # Its lead is of bytes too: weighed against the way all known concepts say it.
    lead = math.exp(sum_logs(lens, ids, spelled[:5])) + shared_mass(lens, ids, "Every ")
    assert p[graph.nodes.index("zebra")] == pytest.approx(joint / lead, rel=1e-3)


def sum_logs(lens, ids: list[int], tokens: list[int]) -> float:
    return math.log(oracle_probability(lens, ids + tokens, len(tokens)))


def shared_mass(lens, ids: list[int], start: str) -> float:
    logprobs = oracle_logprobs(lens, ids)[-1]
    vocabulary = [lens.tokenizer.decode([i]) for i in range(lens.tokenizer.vocab_size)]
    return sum(math.exp(logprobs[i]) for i, t in enumerate(vocabulary) if t.startswith(start))


# ---- continuations


def test_continuations_of_ragged_prompts_equal_the_oracle(twin, monkeypatch):
    monkeypatch.setattr(twin.look_inside, "ROWS", 3)
    rng = np.random.default_rng(3)
    words = np.setdiff1d(np.arange(200), list(TOKENS.values()))
    start, end, latent = TOKENS["start"], TOKENS["end"], TOKENS["latent"]
    rows = [
        as_row(i, [*rng.choice(words, n).tolist(), start, *[latent] * k, end], None)
        for i, (n, k) in enumerate([(4, 0), (9, 2), (2, 3), (6, 1)])
    ]
    parts = [
        [rng.choice(words, n).tolist() for n in lengths]
        for lengths in ([1, 4], [], [2, 2, 7, 1], [3])
    ]
    model, _, _ = twin.weights.load_model(MODELS / "gpt2-tiny")
    batch = collate(rows, TOKENS["eos"])
    first, found = twin.look_inside.continuation_logprobs(model, batch, batch.n_passes, parts)
    oracle = naive.GPT2.load(MODELS / "gpt2-tiny")
    assert [len(values) for values in found] == [2, 0, 4, 1]
    for row, p, row_parts, values in zip(rows, first, parts, found, strict=True):
        own = np.log(naive.softmax(naive.logits(oracle, row.ids, latent)))
        assert np.abs(p - own[-1]).max() < LOGPROBS
        for tokens, logprobs in zip(row_parts, values, strict=True):
            whole = np.log(naive.softmax(naive.logits(oracle, row.ids + tokens, latent)))
            n = len(row.ids)
            expected = [whole[n - 1 + i, token] for i, token in enumerate(tokens)]
            assert np.abs(logprobs - expected).max() < LOGPROBS


@pytest.mark.parametrize("name", ["qwen2-tiny", "qwen2-tiny-untied"])
def test_any_architecture_can_be_traced(twin, name):
    model, _, _ = twin.weights.load_model(MODELS / name)
    ids = [5, 6, 7, 8, TOKENS["start"], TOKENS["latent"], TOKENS["latent"], TOKENS["end"]]
    batch = collate([as_row(0, ids, None)], TOKENS["eos"])
    trace = twin.look_inside.trace(model, batch, batch.n_passes)
    out = twin.latent.latent_forward(model, twin.latent.Inputs.of(batch), batch.first_latent, 2)
    logits = to_numpy(model.head(out.hidden))[0, 4:6]
    logits -= logits.max(axis=1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert np.abs(trace.logprobs - logprobs).max() < LOGPROBS
    assert np.abs(trace.attention.sum(axis=-1) - 1).max() < PROBABILITY
    # A latent sees nothing behind itself.
    assert trace.attention[0, :, :, 6:].max() == 0 < trace.attention[1, :, :, 6].min()
    first, found = twin.look_inside.continuation_logprobs(model, batch, 2, [[[9, 10, 11]]])
    longer = collate([as_row(0, [*ids, 9, 10, 11], None)], TOKENS["eos"])
    out = twin.latent.latent_forward(model, twin.latent.Inputs.of(longer), longer.first_latent, 2)
    p = naive.softmax(to_numpy(model.head(out.hidden))[0, 7:10])
    expected = np.log(p[np.arange(3), [9, 10, 11]])
    assert np.abs(found[0][0] - expected).max() < LOGPROBS
    assert np.abs(np.exp(first[0]) - p[0]).max() < PROBABILITY


# ---- what is said about the checkpoint


def test_untrained_quantities_are_named(twin, tmp_path):
    lens = open_lens(twin, write_checkpoint(tmp_path / "a", "pairs"))
    assert [lens.is_trained(k) for k in range(4)] == [True] * 4
    assert lens.notes(read_graph(QUESTION)) == []
    straight = write_checkpoint(tmp_path / "b", "pairs", method="coconut_no_curriculum")
    lens = open_lens(twin, straight, n_thoughts=4)
    assert [lens.is_trained(k) for k in range(5)] == [False, False, False, True, False]
    notes = " ".join(lens.notes(read_graph("Who?")))
    assert "outside of it" in notes and "more are outside" in notes and "no graph" in notes


def test_what_was_taught_and_what_is_fed_back_is_named(twin, tmp_path):
    graph = read_graph(QUESTION.replace("jompus", "cat"))
    for i, (fields, said) in enumerate(
        [
            ({"labelled_thoughts": True}, "what it was taught, not what emerged"),
            ({"feedback": "token"}, "which is not fed back"),
            ({"feedback": "layer:1|rms"}, "Feedback rule layer:1|rms: lengths and cosines"),
        ]
    ):
        lens = open_lens(twin, write_checkpoint(tmp_path / str(i), "statements", **fields))
        [told], [unknown] = lens.notes(graph), warnings(lens.tokenizer, graph)
        assert said in told and "not trained on: cat; it knows 55" in unknown
        [other] = warnings(lens.tokenizer, read_graph("Who?"))
        assert "not a ProsQA question (Every X is a Y." in other
        [neither] = warnings(
            lens.tokenizer, read_graph("Tom is a wumpus. Is Tom a lempus or rempus?")
        )
        assert "both of the choices, or neither" in neither
        assert warnings(lens.tokenizer, read_graph(QUESTION)) == []


def test_latents_added_one_at_a_time_are_counted_so_when_opened_again(twin, tmp_path):
    fields = {"c_thought": 2, "max_latent_stage": 2, "stage": 3}
    for growth, own in (("stage", 4), ("one", 3)):
        path = write_checkpoint(tmp_path / growth, "pairs", latent_growth=growth, **fields)
        assert open_lens(twin, path).own_thoughts == own


def test_forced_texts_need_positions_too(twin, checkpoints):
    lens = open_lens(twin, checkpoints["pairs"], n_thoughts=1)
    texts = [f"Every {w} is a {w}." for w in read_graph(QUESTION).nodes]
    longest = 448 - max(len(lens.tokenizer.encode(text)) for text in texts)
    question = " " * (longest - len(prompt_of(lens, " " + QUESTION)) + 1) + QUESTION
    assert read_graph(question) is not None and len(prompt_of(lens, question)) == longest
    found = lens.inspect(question, max_new_tokens=1)
    assert all(math.isfinite(sum(stop.choices)) for stop in found.stops)
    with pytest.raises(UserError, match="that are forced behind them, but the model has 448"):
        lens.inspect(" " + question, max_new_tokens=1)


def prompt_of(lens, question: str) -> list[int]:
    """The longest prompt, of all thoughts."""
    t = lens.tokenizer
    return [*t.encode(question + "\n"), t.start_id, *[t.latent_id] * lens.n_thoughts, t.end_id]


def test_a_question_that_cannot_be_asked_is_refused(twin, checkpoints):
    lens = open_lens(twin, checkpoints["pairs"])
    with pytest.raises(UserError, match="question: is empty"):
        lens.inspect(" \n")
    with pytest.raises(UserError, match="448 positions; shorten it"):
        lens.inspect("a?" * 300)
    assert lens.inspect("Who is Tom?", max_new_tokens=2).graph is None


# ---- the command


@pytest.fixture
def items(tmp_path) -> Path:
    content = [
        {"question": "Sam is a rempus. Is Sam a rempus or wumpus?", "answer": "x", "steps": []},
        {"question": QUESTION, "answer": ANSWER, "steps": ["Tom is a wumpus."]},
    ]
    (tmp_path / "items.json").write_text(json.dumps(content))
    return tmp_path / "items.json"


def command(twin, *argv: object) -> None:
    main(twin.__name__, twin.run.make_backend, [*map(str, argv), "--max-new-tokens", "4"])


@pytest.mark.slow
def test_json_holds_everything_and_the_twins_agree(checkpoints, items, capsys):
    found = []
    for name in CHOSEN:
        twin = load_twin(name)
        model = ("--model", checkpoints["pairs"])
        command(twin, *model, "--data", items, "--idx", 1, 0, "--question", "Who?", "--json")
        lines = capsys.readouterr().out.splitlines()
        found.append([json.loads(line) for line in lines])
    for typed, second, first in found:
        assert (typed["idx"], second["idx"], first["idx"]) == (None, 1, 0)
        assert typed["graph"] is None and typed["readings"] == [] and typed["gold"] is None
        assert second["gold"] == ANSWER and first["gold"] == "x"
        assert second["graph"]["nodes"][second["graph"]["right"]] == "zumpus"
        assert [r["kind"] for r in second["readings"]] == ["step", "fact", "answer", "thought"]
    assert_alike(found[0], found[-1])


def assert_alike(ours, theirs) -> None:
    """The same JSON but for the last digits of its numbers."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(ours, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_alike(one, other)
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)
    else:
        assert ours == theirs


def test_piped_tables_are_plain_and_name_what_they_show(twin, checkpoints, items, capsys):
    command(twin, "--model", checkpoints["statements"], "--data", items, "--idx", 1)
    out = capsys.readouterr().out
    assert "\x1b" not in out and "─" not in out
    assert f"right answer: {ANSWER}" in out
    for title in ("If it stopped", "Thoughts (", "Attention of", "Latent tree: the next concept"):
        assert title in out
    tree = out.split("Latent tree")[1].splitlines()
    (lempus,) = [line.split() for line in tree if line.strip().startswith("lempus")]
    # Two hops from Tom: marked after two thoughts.
    assert lempus[1] == "2" and [cell.endswith("*") for cell in lempus[2:]] == [False] * 2 + [
        True,
        False,
    ]


def test_terminal_tables_have_colour_unless_no_color_is_set(twin, checkpoints, monkeypatch):
    lens = open_lens(twin, checkpoints["pairs"])
    found = lens.inspect(QUESTION, "\x1b[31mred", max_new_tokens=2)
    shown = {}
    for no_color in ("", "1"):
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setenv("FORCE_COLOR", "1")
        stream = io.StringIO()
        Tables(stream).show(found, "step")
        shown[no_color] = stream.getvalue()
    assert "\x1b[1m" in shown[""] and "\x1b[" not in shown["1"]
    # What data say is never acted on by the terminal.
    assert all("\x1b[31mred" not in text and "\\x1b[31mred" in text for text in shown.values())


@pytest.mark.parametrize("kind", ["step", "thought"])
def test_on_a_narrow_terminal_no_word_and_no_number_is_broken(twin, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("FORCE_COLOR", "1")
    path = write_checkpoint(tmp_path / "six", "statements", n_thoughts=6)
    found = open_lens(twin, path).inspect(QUESTION, max_new_tokens=2)
    texts = {}
    for columns in ("80", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        stream = io.StringIO()
        Tables(stream).show(found, kind)
        texts[columns] = stream.getvalue()
        attention, tree = texts[columns].split("Attention of")[1].split("Latent tree")
        for word in ("lempus", "jompus", "rempus"):
            assert sum(line.split()[:1] == [word] for line in tree.splitlines()) == 1
        # One line a segment: the sentences, the start marker, the thoughts.
        cells = [line for line in attention.splitlines() if "%" in line]
        assert len(cells) == len(found.segments)
        assert all(len(line) <= int(columns) for line in tree.splitlines() if "%" in line)
    assert "after 1" in texts["200"] and "after 1" not in texts["80"].split("Latent tree")[1]
    wide_tree = texts["200"].split("Latent tree")[1]
    assert ("after 0" in wide_tree) == (kind == "step")  # before the first there is none to read


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "nothing to look at; give --data FILE or --question TEXT"),
        (["--idx", "0"], "--idx: chooses items of a file"),
        (["--data", "{items}", "--idx", "2"], "{items}: has no item 2, only 0 to 1"),
        (["--data", "none.json"], "none.json: no such file"),
        (["--question", "a", "--latents", "-1"], "--latents: must be at least 0, got -1"),
        (["--question", "a", "--top", "0"], "--top: must be at least 1, got 0"),
        (["--question", " "], "question: is empty"),
        (["--question", "a \ud800"], "lone surrogate"),
        (["--question", "a", "--model", "none"], "none"),
    ],
)
def test_bad_input_ends_with_one_message(twin, checkpoints, items, capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        command(twin, "--model", checkpoints["pairs"], *(a.format(items=items) for a in argv))
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    assert message.format(items=items) in err and "Traceback" not in err


def test_a_model_without_thoughts_is_shown_by_what_it_prints(twin, tmp_path, capsys):
    plain = write_checkpoint(tmp_path / "cot", "pairs", method="cot", latent_ids=None, stage=0)
    command(twin, "--model", plain, "--question", QUESTION)
    assert "has no thoughts, it only prints" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command(twin, "--model", plain, "--question", QUESTION, "--latents", 2)
    assert "was trained by cot, which has no thoughts" in capsys.readouterr().err


def test_a_circle_is_a_graph_whose_concepts_the_first_thoughts_name(twin):
    root = Path(__file__).parents[2]
    item = json.loads((root / "data/hops_valid.json").read_text())[1]
    lens = open_lens(twin, root / "data/checkpoints/hops")
    found = lens.inspect(item["question"], item["answer"], 1, max_new_tokens=24)
    assert found.graph is not None and found.graph.choices == () and not found.warnings
    assert found.stops[-1].is_correct and found.stops[-1].choices in (None, [])
    # A step without a subject is neither in the question nor not.
    assert set(found.stops[0].chain_is_stated) == {None}
    named = [thought.top[0][0] for thought in found.thoughts]
    assert [text.strip() for text in named[:2]] == [step.strip() for step in item["steps"][:2]]


def test_a_tokenizer_that_does_not_write_back_what_it_read_is_named(monkeypatch):
    tokenizer = TOKENIZERS["statements"]().with_latents()
    case = forced.Case("Every", [], " is a {}.\n")
    assert forced.spelled(tokenizer, case, "lempus").tokens
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **_: "")
    with pytest.raises(UserError, match="does not write 'Every lempus' back"):
        forced.spelled(tokenizer, case, "lempus")
