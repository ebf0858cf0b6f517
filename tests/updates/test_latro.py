"""LaTRO's steps on both twins: golden updates, the slow oracle, gradients by enumeration."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import naive
import numpy as np
import pytest
from conftest import few
from golden_models import MODELS, TOKENS, golden
from safetensors.numpy import load_file, save_file
from tiny import MODEL, assert_same_gradients, gradient_scale

from coconut.batches.batch import collate
from coconut.batches.credit import credit
from coconut.batches.curriculum import Row
from coconut.batches.decoding import Decoding
from coconut.batches.rollouts import Rollout, Stops, collate_rollouts, make_rollout

PAD, LATENT = TOKENS["latro_pad"], TOKENS["latent"]
SCORES = {"rtol": 1e-4, "atol": 1e-3}
"""Golden README's tolerance for summed log-probabilities; observed 4e-6 relative."""
NORMS = 1e-4
"""Relative, of gradient norms; observed 2e-5."""
ORACLE = 1e-4
"""Absolute, of one token's log-probability against float64; observed 2e-5."""
ESTIMATOR = 1e-6
"""Of the largest gradient, computed in float64 where the twin has it; observed 2.4e-7: weights of
targets, and the moment that is read, are float32."""


def policy(twin, directory: Path = MODEL, float64: bool = False, **options):
    """(Policy, its Trainer, the architecture's module)."""
    model, module, _ = twin.weights.load_model(directory)
    if float64 and twin.__name__ == "cuda_coconut":
        model.double()
    elif float64:
        import mlx.core as mx

        model.apply(lambda w: w.astype(mx.float64))
    trainer = twin.train.Trainer(model, weight_decay=0.0, **options)
    return twin.latro.Policy(trainer), trainer, module


def scaled(directory: Path, scale: float) -> Path:
    """The golden GPT-2 with every parameter multiplied."""
    directory.mkdir()
    (directory / "config.json").write_text((MODEL / "config.json").read_text())
    weights = load_file(MODEL / "model.safetensors")
    save_file(
        {n: w * np.float32(scale) for n, w in weights.items()}, directory / "model.safetensors"
    )
    return directory


def update(twin, p, trainer, module, scratch: Path, batches):
    """(PolicyStats, gradients by Hugging Face name), read from AdamW's first moment."""
    stats = p.step(batches, 0.0)
    if twin.__name__ == "mlx_coconut":  # its files hold no float64
        import mlx.core as mx
        from mlx.utils import tree_map

        state = tree_map(
            lambda a: a.astype(mx.float32) if a.dtype == mx.float64 else a, trainer.optimizer.state
        )
        trainer.optimizer.state = state
    twin.weights.save_moments(trainer.optimizer, module, scratch)
    moments = load_file(scratch / "optimizer.safetensors")
    return stats, {n[2:]: m * np.float32(10) for n, m in moments.items() if n.startswith("m.")}


def random_rollouts(n: int, seed: int = 0, tails: bool = True, latents: int = 0) -> list[Rollout]:
    rng = np.random.default_rng(seed)
    words = np.setdiff1d(np.arange(200), list(TOKENS.values()))

    def some(low, high):
        return rng.choice(words, rng.integers(low, high)).tolist()

    made = []
    for i in range(n):
        question = some(2, 6)
        thoughts = [TOKENS["start"], *[LATENT] * latents, TOKENS["end"]] if latents else []
        shared = some(0, 5) if i else []
        tail, bridge = (some(0, 3), some(1, 3)) if tails else ([], [])
        first = len(question) + 1 if latents else -1
        prompt = question + thoughts
        made.append(
            Rollout(prompt, shared, tail, bridge, some(1, 4), len(shared), True, first, latents)
        )
    return made


def oracle_scores(r: Rollout, latent: int | None = None) -> tuple[list[float], list[float]]:
    """Log-probabilities of what was said and of the answer, a whole sequence each, no cache."""
    model = naive.GPT2.load(MODEL)
    found = []
    for context, targets in ((r.prompt, r.said), (r.prompt + r.shared + r.bridge, r.answer)):
        ids = context + targets
        p = naive.softmax(naive.logits(model, ids, latent))
        found.append([float(np.log(p[t - 1, ids[t]])) for t in range(len(context), len(ids))])
    return found[0], found[1]


# ---- golden


@pytest.mark.parametrize("case", golden("latro")["get_logprob_reward"], ids=lambda c: c["name"])
def test_golden_log_probability_of_a_span_and_its_gradient(twin, tmp_path, case):
    inputs, outputs = case["inputs"], case["outputs"]
    lengths = np.broadcast_to(
        np.array(inputs["context_lengths"]).reshape(-1), len(outputs["reward"])
    )
    rows = []
    for ids, context in zip(inputs["input_ids"], lengths, strict=True):
        # The published context counts pads; its span begins with the token before.
        n_pads = ids.index(next(t for t in ids if t != inputs["pad_token_id"]))
        before, span = ids[n_pads:context], ids[context:]
        rows.append(Rollout(before, [], [], [], span, 0, True))
    p, trainer, module = policy(twin, MODELS / inputs["model"])
    batch = collate_rollouts(rows, PAD)
    _, rewards = batch.sums(p.score(batch).logprobs)
    np.testing.assert_allclose(rewards, outputs["reward"], **SCORES)
    weighted = collate_rollouts(rows, PAD, advantages=[0] * len(rows), n_rows=len(rows))
    _, grads = update(twin, p, trainer, module, tmp_path, [weighted])
    for name, norm in outputs["grad_norms_of_minus_mean"].items():
        ours = np.linalg.norm(grads[name.removeprefix("transformer.")])
        assert ours == pytest.approx(norm, rel=NORMS, abs=1e-4), name


@pytest.mark.parametrize("case", golden("latro")["training_step"], ids=lambda c: c["name"])
def test_golden_update_as_released(twin, tmp_path, case):
    inputs, outputs = case["inputs"], case["outputs"]
    K, pad = inputs["rloo_k"], inputs["pad_token_id"]
    stops = Stops(frozenset(inputs["stop_token_ids"]), lambda tokens: "")
    rows = []
    for i, tokens in enumerate(inputs["sampled_responses"]):
        prompt = Row(i, [t for t in inputs["queries"][i // K] if t != pad], None, -1, 0)
        answer = [t for t in inputs["final_responses"][i // K] if t != pad]
        rows.append(make_rollout(prompt, tokens, answer, stops, "", None, include_stop=False))
    for r, ids, kept in zip(
        rows, outputs["query_ppresponse_finals"], outputs["truncated_responses"], strict=True
    ):
        assert r.prompt + r.shared + r.answer == [t for t in ids if t != pad]
        assert r.shared == [t for t in kept if t != pad]

    p, trainer, module = policy(twin)
    reference, _, _ = policy(twin, scaled(tmp_path / "reference", inputs["reference_scale"]))
    chunks = [
        slice(i, i + inputs["rollout_batch_size"])
        for i in range(0, len(rows), inputs["rollout_batch_size"])
    ]
    logprobs, rewards, ref_logprobs = [], [], []
    for chunk in chunks:
        batch = collate_rollouts(rows[chunk], PAD, reward_offset=-1)
        z, y = batch.sums(p.score(batch).logprobs)
        logprobs += z.tolist()
        rewards += y.tolist()
        ref_logprobs += batch.sums(reference.score(batch).logprobs)[0].tolist()
    finished = np.array([r.is_finished for r in rows])
    earned = credit(
        np.array(rewards),
        np.array(logprobs),
        np.array(ref_logprobs),
        finished,
        K,
        inputs["kl_coef"],
        "batch_mean" if inputs["non_stop_penalty"] else None,
        inputs["penalty_reward_value"],
    )
    for ours, name in (
        (logprobs, "logprobs"),
        (ref_logprobs, "ref_logprobs"),
        (rewards, "rewards_before_penalty"),
        (earned.penalised, "rewards"),
        (earned.adjusted, "adjusted_rewards"),
        (earned.advantages, "advantages"),
    ):
        np.testing.assert_allclose(ours, outputs[name], err_msg=name, **SCORES)

    m = inputs["micro_batch_size"]
    batches = [
        collate_rollouts(
            rows[i : i + m],
            PAD,
            reward_offset=-1,
            advantages=earned.advantages[i : i + m],
            answer_weight=inputs["sft_penalty"],
            n_rows=len(rows),
        )
        for i in range(0, len(rows), m)
    ]
    stats, grads = update(twin, p, trainer, module, tmp_path, batches)
    for batch, found, loss in zip(batches, stats.logprobs, outputs["losses"], strict=True):
        ours = -(found * batch.target_weight[: batch.n_real]).sum() * len(rows) / m
        assert ours == pytest.approx(loss, rel=NORMS)
    n_micro = len(rows) // m  # the golden norms are of the undivided sum of the micro-batches
    for name, norm in outputs["grad_norms"].items():
        ours = np.linalg.norm(grads[name.removeprefix("transformer.")]) * n_micro
        assert ours == pytest.approx(norm, rel=NORMS, abs=2e-3), name


# ---- scores


@pytest.mark.parametrize("pad_multiple", [1, 16])
@pytest.mark.parametrize("latents", [0, 2])
def test_both_branches_of_a_row_are_scored_as_if_each_stood_alone(twin, latents, pad_multiple):
    rows = random_rollouts(5, latents=latents)
    assert any(r.tail for r in rows) and not rows[0].shared
    p, _, _ = policy(twin)
    batch = collate_rollouts(rows, PAD, pad_multiple)
    scores = p.score(batch)
    expected = [
        x for r in rows for part in oracle_scores(r, LATENT if latents else None) for x in part
    ]
    np.testing.assert_allclose(scores.logprobs, expected, atol=ORACLE)
    alone = [p.score(collate_rollouts([r], PAD)).logprobs for r in rows]
    np.testing.assert_allclose(np.concatenate(alone), scores.logprobs, atol=ORACLE)


def test_reward_is_the_answer_alone(twin):
    (_, r) = random_rollouts(2, seed=3, tails=False)
    p, _, _ = policy(twin)
    whole, before = (
        Rollout(r.prompt[:1], r.prompt[1:] + r.shared + answer, [], [], [], 0, True)
        for answer in (r.answer, [])
    )
    batch = collate_rollouts([r, whole, before], PAD)
    said, answer = batch.sums(p.score(batch).logprobs)
    assert answer[0] == pytest.approx(said[1] - said[2], abs=1e-3)
    released = collate_rollouts([r], PAD, reward_offset=-1)
    early = released.sums(p.score(released).logprobs)[1][0]
    last = p.score(batch).logprobs[: len(r.said)][-1]
    assert early == pytest.approx(answer[0] + last, abs=1e-3)


def test_chunks_of_positions_change_nothing(twin, tmp_path, monkeypatch):
    rows = random_rollouts(6, seed=4)
    found = []
    for chunk in (512, 5):
        monkeypatch.setattr(twin.latro, "CHUNK", chunk)
        p, trainer, module = policy(twin)
        scores = p.score(collate_rollouts(rows, PAD))
        batch = collate_rollouts(rows, PAD, advantages=np.arange(6) - 2.5, n_rows=6)
        stats, grads = update(twin, p, trainer, module, tmp_path, [batch])
        found.append((scores, stats, grads))
    (scores, stats, grads), (scores_5, stats_5, grads_5) = found
    np.testing.assert_allclose(scores_5.logprobs, scores.logprobs, atol=1e-5)
    np.testing.assert_allclose(scores_5.entropies, scores.entropies, atol=1e-5)
    np.testing.assert_allclose(stats_5.logprobs[0], stats.logprobs[0], atol=1e-5)
    assert_same_gradients(grads_5, grads, 1e-5)


def test_entropy_and_temperature_are_those_of_the_tempered_softmax(twin):
    rows = random_rollouts(3, seed=5, tails=False)
    p, _, _ = policy(twin)
    batch = collate_rollouts(rows, PAD, temperature=1.7)
    scores = p.score(batch)
    logits = np.concatenate(
        [
            naive.logits(naive.GPT2.load(MODEL), ids, None)[len(r.prompt) - 1 : -1]
            for r in rows
            for ids in [r.prompt + r.shared + r.answer]
        ]
    )
    t = np.where(batch.target_is_answer, 1.0, 1.7)[: batch.n_real, None]
    q = naive.softmax(logits / t)
    np.testing.assert_allclose(scores.entropies, -(q * np.log(q)).sum(axis=1), atol=ORACLE)
    picked = np.log(q[np.arange(batch.n_real), batch.target_ids[: batch.n_real]])
    np.testing.assert_allclose(scores.logprobs, picked, atol=ORACLE)


def test_policy_equals_its_reference_until_it_is_updated(twin):
    rows = random_rollouts(4, seed=6)
    p, _, _ = policy(twin)
    p.keep_reference()
    batch = collate_rollouts(rows, PAD)
    before = p.score(batch, of_reference=True).logprobs
    np.testing.assert_array_equal(p.score(batch).logprobs, before)
    p.step([collate_rollouts(rows, PAD, advantages=[1.0] * 4, n_rows=4)], 1e-3)
    np.testing.assert_array_equal(p.score(batch, of_reference=True).logprobs, before)
    assert abs(p.score(batch).logprobs - before).max() > 0.1


def letters(tokens) -> str:
    """A text in which stop strings can be found: a letter a token."""
    return "".join("abcdefgh"[t % 8] for t in tokens)


STOPS = {
    "ids": Stops(frozenset(range(0, 200, 7)), lambda tokens: ""),
    "strings": Stops(frozenset(), letters, ("ab", "ca", "ed", "fc", "gg", "hb")),
}


@pytest.mark.parametrize(
    "temperature, bf16, stops, latents",
    few(
        [
            (1.0, False, "ids", 0),
            (1.0, True, "ids", 0),
            (1.4, False, "strings", 0),
            (0.7, False, "strings", 2),
            (1.4, True, "strings", 2),
        ],
        2,
    ),
)
@pytest.mark.compiled
def test_log_probabilities_agree_when_drawn_when_scored_and_when_updated(
    twin, temperature, bf16, stops, latents
):
    """Prompts of different lengths, padded on the left where thoughts follow; early stops."""
    p, _, _ = policy(twin, bf16=bf16)
    words = np.random.default_rng(7).integers(31, 80, (3, 6)).tolist()
    prompts = []
    for i, ids in enumerate(words):
        thoughts = [TOKENS["start"], *[LATENT] * latents, TOKENS["end"]] if latents else []
        first = 4 + i if latents else -1
        prompts.append(Row(i, ids[: 3 + i] + thoughts, None, first, latents))
    batch = collate(prompts, PAD)
    assert batch.mask[:, 0].all() == (not latents)
    source = np.repeat(np.arange(3), 4)
    decoding = Decoding(9, TOKENS["eos"], temperature, 1, STOPS[stops].ended)
    drawn = p.sample(batch, decoding, source, [(i,) for i in range(12)])
    rows = [
        make_rollout(prompts[s], d.tokens, [5, 6], STOPS[stops], "", None, True)
        for s, d in zip(source, drawn, strict=True)
    ]
    assert len({len(d.tokens) for d in drawn}) > 1
    # Nothing is drawn beyond a stop, so everything drawn is what the policy is held to.
    assert [r.said for r in rows] == [d.tokens for d in drawn]
    batch = collate_rollouts(rows, PAD, temperature=temperature)
    scored, _ = batch.sums(p.score(batch).logprobs)
    # bfloat16 keeps 8 bits: batches of other shapes round otherwise. Observed 0.05 a token.
    tolerance = 0.15 * 9 if bf16 else 1e-4
    np.testing.assert_allclose([sum(d.logprobs) for d in drawn], scored, atol=tolerance)
    weighted = collate_rollouts(
        rows, PAD, temperature=temperature, advantages=[1.0] * 12, n_rows=12
    )
    stats = p.step([weighted], 1e-4)
    updated, _ = weighted.sums(stats.logprobs[0])
    np.testing.assert_allclose(updated, scored, atol=tolerance)


# ---- gradients


@pytest.mark.parametrize("sizes", [(3, 3), (4, 2)])
def test_micro_batches_give_the_gradient_of_one_batch(twin, tmp_path, sizes):
    rows, advantages = random_rollouts(6, seed=8), np.array([1.0, -2, 0.5, 3, -1, 0.1])
    found = []
    for parts in ((6,), sizes):
        starts = [sum(parts[:i]) for i in range(len(parts))]
        batches = [
            collate_rollouts(
                rows[s : s + n], PAD, advantages=advantages[s : s + n], answer_weight=0.7, n_rows=6
            )
            for s, n in zip(starts, parts, strict=True)
        ]
        p, trainer, module = policy(twin)
        found.append(update(twin, p, trainer, module, tmp_path, batches)[1])
    assert_same_gradients(found[1], found[0], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("latents", [0, 2])
@pytest.mark.parametrize("answer_weight", [0.0, 0.6])
def test_gradient_is_the_slope_of_the_loss(twin, tmp_path, latents, answer_weight):
    """Against central differences of the float64 oracle; through the thoughts as well."""
    rows, advantages = random_rollouts(3, seed=9, latents=latents), [1.0, -0.5, 2.0]
    if latents and not answer_weight:
        advantages = [0.0, 0.0, 1.0]
    batch = collate_rollouts(
        rows, PAD, advantages=advantages, answer_weight=answer_weight, n_rows=3
    )
    p, trainer, module = policy(twin)
    _, grads = update(twin, p, trainer, module, tmp_path, [batch])
    model = naive.GPT2.load(MODEL)
    latent = LATENT if latents else None

    def loss() -> float:
        total = 0.0
        for r, a in zip(rows, advantages, strict=True):
            for context, targets, w in (
                (r.prompt, r.said, a),
                (r.prompt + r.shared + r.bridge, r.answer, answer_weight),
            ):
                ids = context + targets
                if targets and w:
                    q = naive.softmax(naive.logits(model, ids, latent))
                    total -= w * sum(
                        np.log(q[t - 1, ids[t]]) for t in range(len(context), len(ids))
                    )
        return total / 3

    rng = np.random.default_rng(0)
    names = sorted(model.weights)
    for name in rng.choice(names, 6, replace=False):
        w = model.weights[name]
        at = np.unravel_index(int(abs(grads[name]).argmax()), w.shape)
        kept, ends = w[at], []
        for step in (1e-5, -1e-5):
            w[at] = kept + step
            ends.append(loss())
        w[at] = kept
        slope = (ends[0] - ends[1]) / 2e-5
        assert grads[name][at] == pytest.approx(slope, rel=1e-3, abs=1e-4), name


VOCABULARY, PROMPT, ANSWER = 6, [3, 1], [2]


def enumeration_model(directory: Path) -> Path:
    """A GPT-2 of one layer over six tokens: all rationales of one token can be counted out."""
    directory.mkdir()
    config = json.loads((MODEL / "config.json").read_text())
    config |= {"vocab_size": VOCABULARY, "n_layer": 1, "n_positions": 8, "n_embd": 8, "n_head": 2}
    (directory / "config.json").write_text(json.dumps(config))
    rng, D = np.random.default_rng(3), 8
    shapes = {
        "wte.weight": (VOCABULARY, D), "wpe.weight": (8, D),
        "h.0.attn.c_attn.weight": (D, 3 * D), "h.0.attn.c_attn.bias": (3 * D,),
        "h.0.attn.c_proj.weight": (D, D), "h.0.attn.c_proj.bias": (D,),
        "h.0.mlp.c_fc.weight": (D, 4 * D), "h.0.mlp.c_fc.bias": (4 * D,),
        "h.0.mlp.c_proj.weight": (4 * D, D), "h.0.mlp.c_proj.bias": (D,),
        **{f"{n}.{k}": (D,) for n in ("h.0.ln_1", "h.0.ln_2", "ln_f") for k in ("weight", "bias")},
    }  # fmt: skip
    weights = {n: rng.normal(size=s, scale=0.4).astype(np.float32) for n, s in shapes.items()}
    weights |= {n: w + 1 for n, w in weights.items() if "ln_" in n and n.endswith("weight")}
    save_file(weights, directory / "model.safetensors")
    return directory


def toy_probabilities(model: naive.GPT2) -> tuple[np.ndarray, np.ndarray]:
    """(p(z | x), log p(y | x, z)) for every rationale z of one token, float64."""
    p = naive.softmax(naive.logits(model, PROMPT, None))[-1]
    rewards = [
        np.log(naive.softmax(naive.logits(model, [*PROMPT, z], None))[-1, ANSWER[0]])
        for z in range(VOCABULARY)
    ]
    return p, np.array(rewards)


def has_float64(twin) -> bool:
    """MLX has it on the CPU only."""
    if twin.__name__ == "cuda_coconut":
        return True
    import mlx.core as mx

    return mx.default_device() == mx.cpu


@pytest.mark.slow
@pytest.mark.parametrize("answer_weight", [1.0, 0.0])
def test_expected_estimator_is_the_gradient_of_the_objective(twin, tmp_path, answer_weight):
    """Every pair of rationales, weighted by its probability, against the slope of the exact J.

    Without the answer term the estimator leaves that part of the gradient out (spec 1.2, 8.2).
    """
    directory = enumeration_model(tmp_path / "toy")
    beta = 0.3
    oracle, reference = naive.GPT2.load(directory), naive.GPT2.load(directory)
    for w in reference.weights.values():
        w *= 0.9
    ref_p, _ = toy_probabilities(reference)
    p_z, rewards = toy_probabilities(oracle)

    rows = [Rollout(PROMPT, [z], [], [], ANSWER, 1, True) for z in range(VOCABULARY)]
    # The estimator is linear in what multiplies each rationale's two gradients: one update whose
    # rows weigh their expected advantage holds all 36 pairs.
    expected_advantage, drawn = np.zeros(VOCABULARY), np.zeros(VOCABULARY)
    for pair in itertools.product(range(VOCABULARY), repeat=2):
        z = np.array(pair)
        earned = credit(
            rewards[z], np.log(p_z[z]), np.log(ref_p[z]), np.ones(2, bool), 2, beta, None, 0
        )
        weight = p_z[z].prod() / 2
        np.add.at(expected_advantage, z, weight * earned.advantages)
        np.add.at(drawn, z, weight)
    p, trainer, module = policy(twin, directory, float64=has_float64(twin))
    batches = [
        collate_rollouts(
            [row], 0, advantages=[expected_advantage[z]], answer_weight=answer_weight * drawn[z]
        )
        for z, row in enumerate(rows)
    ]
    _, grads = update(twin, p, trainer, module, tmp_path, batches)

    def objective() -> float:
        now_p, now_rewards = toy_probabilities(oracle)
        # With weight 0 the estimator still knows the rewards as constants, so only p moves.
        r = now_rewards if answer_weight else rewards
        return float((now_p * (r - beta * np.log(now_p / ref_p))).sum())

    scale, rng = max(float(abs(g).max()) for g in grads.values()), np.random.default_rng(0)
    for name, w in oracle.weights.items():
        # The steepest entries of each tensor and a few others.
        flat = [*np.argsort(abs(grads[name]), axis=None)[-3:], *rng.integers(w.size, size=2)]
        for at in (np.unravel_index(int(i), w.shape) for i in flat):
            kept, ends = w[at], []
            for step in (1e-4, -1e-4):
                w[at] = kept + step
                ends.append(objective())
            w[at] = kept
            gap = abs(-grads[name][at] - (ends[0] - ends[1]) / 2e-4)
            assert gap < ESTIMATOR * max(scale, 1), (name, gap)
    assert gradient_scale(grads, "wte.weight") > 1e-3


def test_twins_agree_on_rewards_advantages_and_gradients(tmp_path):
    from conftest import load_twin

    rows, found = random_rollouts(6, seed=10), []
    for name in ("mlx", "cuda"):
        twin = load_twin(name)
        p, trainer, module = policy(twin)
        batch = collate_rollouts(rows, PAD)
        said, rewards = batch.sums(p.score(batch).logprobs)
        earned = credit(rewards, said, said * 1.01, np.ones(6, bool), 3, 0.05, "constant", 2)
        weighted = collate_rollouts(rows, PAD, advantages=earned.advantages, n_rows=6)
        _, grads = update(twin, p, trainer, module, tmp_path, [weighted])
        found.append((earned, grads))
    (ours, grads), (theirs, their_grads) = found
    np.testing.assert_allclose(ours.rewards, theirs.rewards, atol=1e-4)
    np.testing.assert_allclose(ours.advantages, theirs.advantages, atol=1e-4)
    assert_same_gradients(grads, their_grads, 1e-4)


def test_sampled_rationales_are_the_same_in_both_twins():
    from conftest import load_twin

    prompts = collate([Row(0, [40, 41, 42], None, -1, 0), Row(1, [50], None, -1, 0)], PAD)
    decoding = Decoding(8, TOKENS["eos"], 1.0, 5)
    source, streams = np.array([0, 0, 1, 1]), [(0, i) for i in range(4)]
    ours, theirs = (
        policy(load_twin(name))[0].sample(prompts, decoding, source, streams)
        for name in ("mlx", "cuda")
    )
    assert [row.tokens for row in ours] == [row.tokens for row in theirs]


def test_log_ratios_of_samples_average_to_the_divergence(twin, tmp_path):
    directory = enumeration_model(tmp_path / "toy")
    p, _, _ = policy(twin, directory)
    p.keep_reference()
    rows = [Rollout(PROMPT, [z], [], [], ANSWER, 1, True) for z in range(VOCABULARY)]
    p.step([collate_rollouts(rows, 0, advantages=[3.0, -1, 0, 2, 0, 0], n_rows=6)], 0.02)
    batch = collate_rollouts(rows, 0)
    said, _ = batch.sums(p.score(batch).logprobs)
    ref, _ = batch.sums(p.score(batch, of_reference=True).logprobs)
    exact = (np.exp(said) * (said - ref)).sum()
    n = 4000
    prompts = collate([Row(0, PROMPT, None, -1, 0)], 0)
    drawn = p.sample(
        prompts, Decoding(1, -1, 1.0, 0), np.zeros(n, np.int64), [(i,) for i in range(n)]
    )
    ratios = (said - ref)[[d.tokens[0] for d in drawn]]
    assert exact > 0.01
    assert abs(ratios.mean() - exact) < 4 * ratios.std() / np.sqrt(n)
