"""LaTRO's other objectives: advantage rules, KL forms, clipped ratios, against independent sums.

The formulas on the right-hand side are written out here a second time, with torch's autograd in
float64: as the papers have them and, where trl has the same thing, as trl computes them.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import naive
import numpy as np
import pytest
from conftest import few, load_twin
from test_latro import (
    ANSWER,
    ESTIMATOR,
    MODEL,
    PAD,
    PROMPT,
    VOCABULARY,
    enumeration_model,
    has_float64,
    policy,
    random_rollouts,
    toy_probabilities,
    update,
)
from tiny import gradient_scale

from coconut.batches.credit import credit, length_factors, mixed, over_siblings
from coconut.batches.rollouts import Rollout, collate_rollouts
from coconut.batches.surrogate import surrogate
from coconut.config.latro_keys import LatroConfig
from coconut.run.latro.draw_and_score import Rollouts, Scored
from coconut.run.latro.policy_update import Round, step
from coconut.world import World

torch: Any = None
"""Imported by the tests that run, as in every file."""


@pytest.fixture(autouse=True)
def _torch() -> None:
    global torch
    torch = pytest.importorskip("torch")


RULES = ("rloo", "grpo", "dr_grpo", "remax")
LEVELS = ("token", "sequence", "sequence_mean")

# ---- arithmetic on the host


def by_definition(rule: str, r: torch.Tensor, greedy: torch.Tensor) -> torch.Tensor:
    """Advantages (P, K) of rewards (P, K) in trl's words, remax in its paper's."""
    K = r.shape[1]
    if rule == "rloo":
        return r - (r.sum(1, keepdim=True) - r) / (K - 1)
    if rule == "remax":
        return torch.stack([r[:, k] - greedy for k in range(K)], 1)
    flat, mean = r.view(-1), r.mean(dim=1).repeat_interleave(K)
    if rule == "dr_grpo":
        return (flat - mean).view(-1, K)
    return ((flat - mean) / (r.std(dim=1).repeat_interleave(K) + 1e-4)).view(-1, K)


@pytest.mark.parametrize("rule", RULES)
def test_advantages_are_those_of_the_definition(rule):
    rng = np.random.default_rng(0)
    r, greedy = rng.normal(size=(5, 4)), rng.normal(size=5)
    expected = by_definition(rule, torch.tensor(r), torch.tensor(greedy)).numpy()
    np.testing.assert_allclose(over_siblings(r, rule, greedy), expected, atol=1e-12)


def test_rewards_are_weighted_clipped_and_masked_rows_keep_theirs():
    rewards = {"likelihood": np.array([-3.0, -1.0]), "correct": np.array([1.0, 0.0])}
    weights = {"likelihood": 0.5, "correct": 2.0}
    assert mixed(rewards, weights).tolist() == [0.5, -0.5]
    assert mixed(rewards, weights, clip=0.25).tolist() == [0.25, -0.25]
    given = (np.array([-1.0, -9.0]), np.zeros(2), np.ones(2), np.array([True, False]), 2, 0.5)
    found = credit(*given, "mask", 2, kl_in_reward=False)
    assert found.adjusted.tolist() == [-1, -9] and found.kl_penalty.tolist() == [0.5, 0.5]
    assert credit(*given, None, 2).adjusted.tolist() == [-0.5, -8.5]


def test_rows_are_weighted_by_length_as_trls_loss_types_do():
    lengths, L = np.array([2, 3, 5, 0]), 8
    per_token = [np.random.default_rng(i).normal(size=n) for i, n in enumerate(lengths)]
    expected = {
        "none": sum(x.sum() for x in per_token) / 4,
        "row": np.mean([x.mean() if len(x) else 0 for x in per_token]),
        "batch": np.concatenate(per_token).mean(),
        "constant": np.concatenate(per_token).sum() / (4 * L),
    }
    for norm, loss in expected.items():
        factors = length_factors(lengths, norm, L)
        ours = sum(f * x.sum() for f, x in zip(factors, per_token, strict=True)) / 4
        assert ours == pytest.approx(loss, abs=1e-12), norm


# ---- the loss of the device


def surrogate_by_definition(rows, level, low, high, kl_coef, entropy_coef):
    """Sum over rows of trl's loss: rows of (logp, old, ref, entropy, advantage, weight)."""
    total = torch.zeros((), dtype=torch.float64)
    for logp, old, ref, entropy, advantage, weight in rows:
        log_ratio = logp - old
        if level == "sequence":
            log_ratio = log_ratio.sum(-1, keepdim=True)
        elif level == "sequence_mean":
            log_ratio = log_ratio.mean(-1, keepdim=True)
        coef_1 = torch.exp(log_ratio)
        coef_2 = torch.clamp(coef_1, 1 - low, 1 + high)
        policy = -torch.min(coef_1 * advantage, coef_2 * advantage)
        k3 = torch.exp(ref - logp) - (ref - logp) - 1
        total = total + weight * (policy.sum() + kl_coef * k3.sum() - entropy_coef * entropy.sum())
    return total


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("level", LEVELS)
def test_the_surrogate_is_trls_in_both_twins(level, dtype):
    rng, lengths = np.random.default_rng(1), [3, 1, 4]
    row = np.array([0] * 4 + [1] * 2 + [2] * 5 + [0] * 3)  # an answer behind each, and padding
    is_said = np.array([True] * 3 + [False, True, False] + [True] * 4 + [False] * 4)
    logp, entropy = rng.normal(size=(2, len(row))) - 3
    near = [(logp[is_said & (row == i)] + 0.3 * rng.normal(size=n)) for i, n in enumerate(lengths)]
    old, ref = [[np.float32(x).tolist() for x in near] for _ in range(2)]
    ref = [(np.float32(x) + np.float32(0.5)).tolist() for x in ref]
    advantages, weights = np.float32([1.5, -2.0, 0.75]), np.float32([0.5, 0.25, 1.0])
    s = surrogate(
        row, is_said, old, ref, advantages * weights, weights, level, (0.2, 0.3), 0.5, 0.125
    )

    leaves = [torch.tensor(x, requires_grad=True) for x in (logp, entropy)]
    rows = [
        (
            leaves[0][is_said & (row == i)],
            torch.tensor(old[i], dtype=torch.float64),
            torch.tensor(ref[i], dtype=torch.float64),
            leaves[1][is_said & (row == i)],
            float(advantages[i]),
            float(weights[i]),
        )
        for i in range(3)
    ]
    expected = surrogate_by_definition(rows, level, 0.2, 0.3, 0.5, 0.125)
    expected.backward()

    tolerance = {"float64": 1e-6, "float32": 1e-5}[dtype]
    for loss, grads in (
        ours_in_torch(s, logp, entropy, dtype),
        ours_in_mlx(s, logp, entropy, dtype),
    ):
        assert loss == pytest.approx(expected.item(), rel=tolerance)
        for ours, leaf in zip(grads, leaves, strict=True):
            np.testing.assert_allclose(ours, leaf.grad, atol=tolerance)
    n_clipped, n = s.clipped(logp)
    ratios = [torch.exp(x[0] - x[1]).detach() for x in rows]
    if level != "token":
        ratios = [(x.log().sum() if level == "sequence" else x.log().mean()).exp() for x in ratios]
    bound = [
        ((x < 0.8) if a < 0 else (x > 1.3)).sum().item()
        for x, a in zip(ratios, advantages, strict=True)
    ]
    assert (n_clipped, n) == (sum(bound), sum(x.numel() for x in ratios))


def ours_in_torch(s, logp, entropy, dtype):
    leaves = [
        torch.tensor(x, dtype=getattr(torch, dtype), requires_grad=True) for x in (logp, entropy)
    ]
    arrays = [torch.from_numpy(a) for a in s.arrays]
    loss = load_twin("cuda").latro.surrogate_loss(*leaves, arrays, s.low, s.high)
    loss.backward()
    return loss.item(), [leaf.grad.numpy() for leaf in leaves]


def ours_in_mlx(s, logp, entropy, dtype):
    import mlx.core as mx

    loss = load_twin("mlx").latro.surrogate_loss
    with mx.stream(mx.cpu):
        leaves = [mx.array(x.tolist(), dtype=getattr(mx, dtype)) for x in (logp, entropy)]
        arrays = [mx.array(a) for a in s.arrays]
        found, grads = mx.value_and_grad(
            lambda x, y: loss(x, y, arrays, s.low, s.high), argnums=(0, 1)
        )(*leaves)
        return found.item(), [np.array(g) for g in grads]


# ---- whole updates

OBJECTIVES = [
    {"advantage_rule": "rloo", "ratio_level": "sequence", "num_iterations": 2},
    {"advantage_rule": "grpo", "kl_in": "loss", "ratio_level": "token", "length_norm": "row"},
    {"advantage_rule": "dr_grpo", "kl_in": "loss", "length_norm": "constant", "entropy_coef": 0.1},
    {"advantage_rule": "remax", "ratio_level": "token", "length_norm": "batch"},
    {"advantage_rule": "grpo", "ratio_level": "sequence_mean", "sft_penalty": 0.5, "kl_in": "loss"},
    {"advantage_rule": "rloo", "kl_in": "loss", "penalty_mode": "mask", "entropy_coef": 0.1},
]


@pytest.mark.parametrize("keys", few(OBJECTIVES, 1), ids=lambda k: "-".join(map(str, k.values())))
def test_an_update_is_what_transformers_recomputes_in_float64(twin, tmp_path, keys):
    """Rationales drawn and scored by other weights than those updated, so that ratios clip."""
    config = LatroConfig(
        rloo_k=3, kl_coef=0.3, batch_size_training=4, gradient_accumulation_steps=2,
        clip_epsilon=0.02, clip_epsilon_high=0.04, response_length=7,
        **{"sft_penalty": 1.0, "num_iterations": 2, "penalty_mode": "constant"} | keys,
    )  # fmt: skip
    rows = random_rollouts(6, seed=11)
    rows[4] = Rollout(**{**vars(rows[4]), "is_finished": False})
    finished = np.array([r.is_finished for r in rows])
    model, drew, reference = (hugging_face(scale) for scale in (1.0, 0.97, 0.9))
    with torch.no_grad():
        old, ref = ([spans(m, r)[0][0] for r in rows] for m in (drew, reference))
        answers = np.array([spans(drew, r)[1][0].sum().item() for r in rows])
    old, ref = ([torch.tensor(np.float32(x), dtype=torch.float64) for x in y] for y in (old, ref))
    said, ref_said = (np.array([x.sum().item() for x in y]) for y in (old, ref))
    greedy = np.array([-9.0, -12.0])
    in_reward = config.kl_in == "reward"
    mode = config.penalty_mode
    earned = credit(
        answers,
        said,
        ref_said,
        finished,
        3,
        0.3,
        mode,
        2.0,
        config.advantage_rule,
        in_reward,
        greedy,
    )

    # The same by hand.
    r = torch.tensor(answers - (2.0 * ~finished if mode == "constant" else 0))
    r = r - 0.3 * torch.tensor(said - ref_said) * in_reward
    A = by_definition(config.advantage_rule, r.view(2, 3), torch.tensor(greedy)).view(-1)
    counts = finished.astype(float) if mode == "mask" else np.ones(6)
    lengths = np.array([len(x.said) for x in rows])
    scale = {
        "none": np.ones(6),
        "row": 1 / np.maximum(lengths, 1),
        "batch": 6 / np.full(6, lengths.sum()),
        "constant": np.full(6, 1 / 7),
    }[config.length_norm]
    terms, sft = [], 0.0
    for i, row in enumerate(rows):
        (logp, entropy), (answer, _) = spans(model, row)
        weight = float(counts[i] * scale[i] / 6)
        if len(logp):
            terms.append((logp, old[i], ref[i], entropy, A[i], weight))
        sft = sft - config.sft_penalty * counts[i] * answer.sum() / 6
    kl_coef = 0.0 if in_reward else 0.3
    args = (config.ratio_level, 0.02, 0.04, kl_coef, config.entropy_coef)
    (surrogate_by_definition(terms, *args) + sft).backward()

    p, trainer, module = policy(twin, float64=has_float64(twin))
    found = []

    def policy_step(batches, lr):
        found.append(update(twin, p, trainer, module, tmp_path, batches))
        return found[-1][0]

    data = SimpleNamespace(tokenizer=SimpleNamespace(pad_id=PAD))
    shared = Rollouts(config, SimpleNamespace(policy_step=policy_step), data, World())
    tokens = [[x.tolist() for x in y] for y in (old, ref)]
    scored = Scored(said, answers, ref_said, *tokens, 0.0, int(lengths.sum()), 0)
    drawn = Round(rows, [x.said for x in rows], scored, {"likelihood": answers}, earned, 0.0)
    stepped = step(shared, drawn, 0, 0.0)
    grads = found[0][1]
    assert len(found) == 2 and 0 < stepped.clip_fraction < 1
    named = dict(model.named_parameters())
    largest = max(float(w.grad.abs().max()) for w in named.values() if w.grad is not None)
    tolerance = (10 * ESTIMATOR if has_float64(twin) else 1e-4) * largest
    assert gradient_scale(grads, "wte.weight") > 1e-2
    for name, ours in grads.items():
        theirs = named[f"transformer.{name}"].grad.numpy()
        assert abs(ours - theirs).max() < tolerance, name


def hugging_face(scale: float):
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(MODEL, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        for w in model.parameters():
            w.mul_(scale)
    return model.eval()


def spans(model, r: Rollout):
    """((log-probabilities, entropies) of what was said, the same of the answer)."""
    found = []
    for context, targets in ((r.prompt, r.said), (r.prompt + r.shared + r.bridge, r.answer)):
        logits = model(torch.tensor([context + targets])).logits[0, len(context) - 1 : -1]
        logprobs = logits.log_softmax(-1)
        picked = logprobs[torch.arange(len(targets)), torch.tensor(targets, dtype=torch.long)]
        found.append((picked, -(logprobs.exp() * logprobs).sum(-1)))
    return found


# ---- enumeration

BETA, BONUS = 0.3, 0.2


@pytest.mark.parametrize(
    "rule, kl_in, level",
    few([(r, kl, LEVELS[i % 3]) for i, r in enumerate(RULES) for kl in ("reward", "loss")], 3),
)
def test_expected_update_is_the_slope_of_what_it_climbs(twin, tmp_path, rule, kl_in, level):
    """All 36 pairs of one-token rationales by their probability, on the policy.

    With the KL in the reward it climbs E[r] - beta KL(policy | reference); k3 in the loss climbs
    -beta KL(reference | policy) instead. Of dr_grpo the advantages are half of those of
    rloo; grpo climbs the expectation of its own. The bonus adds its multiple of the entropy.
    """
    directory = enumeration_model(tmp_path / "toy")
    oracle, ref = naive.GPT2.load(directory), naive.GPT2.load(directory)
    for w in ref.weights.values():
        w *= 0.9
    (p_z, rewards), (q_z, _) = toy_probabilities(oracle), toy_probabilities(ref)
    in_reward = kl_in == "reward"

    pairs = np.array(list(itertools.product(range(VOCABULARY), repeat=2)))
    weight, z = p_z[pairs].prod(axis=1), pairs.reshape(-1)
    greedy = np.full(len(pairs), rewards[p_z.argmax()])
    given = (rewards[z], np.log(p_z[z]), np.log(q_z[z]), np.ones(len(z), bool), 2, BETA, None, 0)
    earned = credit(*given, rule, in_reward, greedy)
    of_row = np.repeat(weight, 2) / 2
    rows = [Rollout(PROMPT, [int(i)], [], [], ANSWER, 1, True) for i in z]
    batch = collate_rollouts(rows, 0, advantages=np.zeros(len(rows)), answer_weight=of_row)
    tokens = [[[float(np.log(p[i]))] for i in z] for p in (p_z, q_z)]
    given = (earned.advantages * of_row, of_row, level, (0.2, 0.2), BETA * (not in_reward), BONUS)
    terms = surrogate(batch.target_row, batch.is_said, *tokens, *given)
    batch = type(batch)(**vars(batch) | {"surrogate": terms})
    p, trainer, module = policy(twin, directory, float64=has_float64(twin))
    _, grads = update(twin, p, trainer, module, tmp_path, [batch])

    # What a rationale earns over a sibling, on average; constant while the policy moves.
    worth = rewards - BETA * np.log(p_z / q_z) * in_reward
    expected = np.zeros(VOCABULARY)
    for i, j in pairs:
        pair = torch.tensor([[worth[i], worth[j]]])
        expected[i] += p_z[j] * by_definition(rule, pair, torch.zeros(1))[0, 0].item()

    def climbed() -> float:
        now, now_rewards = toy_probabilities(oracle)
        found = (p_z * now_rewards).sum() + BONUS * -(now * np.log(now)).sum()
        if rule in ("rloo", "remax"):
            own = worth if not in_reward else rewards - BETA * np.log(now / q_z)
            found += (now * own).sum()
        elif rule == "dr_grpo":
            found += (now * worth).sum() / 2
        else:
            found += (now * expected).sum()
        return float(found + BETA * (not in_reward) * (q_z * np.log(now)).sum())

    scale, rng = max(float(abs(g).max()) for g in grads.values()), np.random.default_rng(0)
    for name, w in oracle.weights.items():
        for at in [np.unravel_index(int(abs(grads[name]).argmax()), w.shape),
                   np.unravel_index(int(rng.integers(w.size)), w.shape)]:  # fmt: skip
            kept, ends = w[at], []
            for move in (1e-4, -1e-4):
                w[at] = kept + move
                ends.append(climbed())
            w[at] = kept
            gap = abs(-grads[name][at] - (ends[0] - ends[1]) / 2e-4)
            assert gap < 3 * ESTIMATOR * max(scale, 1), (name, gap)
    assert gradient_scale(grads, "wte.weight") > 1e-3
