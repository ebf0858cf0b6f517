"""Feedback rules: their strings, their formulas, their gradients, and their weights in a run."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import naive
import naive_feedback
import numpy as np
import pytest
from conftest import CHOSEN, few, load_twin
from golden_models import (
    GOLDEN,
    MODELS,
    TOKENS,
    golden,
    golden_batch,
    mlx_gradients,
    ragged_batch,
    to_numpy,
    torch_gradients,
)
from safetensors.numpy import load_file
from tiny import (
    MODEL,
    assert_same_gradients,
    assert_same_updates,
    read_log,
    rows_of,
    run_config,
    start,
)

from coconut.batches.batch import collate
from coconut.batches.curriculum import Row
from coconut.batches.decoding import Decoding
from coconut.checkpoints.adapter_files import fingerprint
from coconut.checkpoints.adapters import Adapter
from coconut.checkpoints.source import Source, _feedback
from coconut.config.keys import RunConfig
from coconut.config.lora_keys import Lora
from coconut.errors import UserError
from coconut.feedback import draws, measures, sources, transforms, weights
from coconut.feedback import rules as rules
from coconut.feedback.attached import prepare
from coconut.feedback.catalogue import SOURCES, TRANSFORMS
from coconut.feedback.rules import parse
from coconut.feedback.statistics import ThoughtStatistics
from coconut.feedback.thinking import Thinker
from coconut.feedback.weights import Setup

RULES = [
    "last",
    "layer:-1|final_norm",
    "layer:0",
    "layer:2|rms",
    "layer:-1|ln",
    "layer:1|ln:rms",
    "depth:0.5|rms:learned",
    "hf:-2",
    "hf:-1",
    "mean",
    "mean:0:2,norm_each,learned|rms",
    "prev_input",
    "last+prev_input",
    "suppressed",
    "suppressed:0:,sign=signed,value=before,agg=sum,threshold=abs:0.3",
    "suppressed:0:,value=after,agg=mean,threshold=topk:7,base=prev_input",
    "suppressed:space=vocab",
    "suppressed:0:,space=vocab,agg=mean,threshold=abs:0.5,tokens=20,base=none|rms",
    "suppressed:space=vocab,subset=30,threshold=topk:9,lam=0.001",
    "last+suppressed_fork:0.5",
    "prev_input+suppressed_fork:-1,threshold=0.3",
    "soft",
    "soft:0.7,topk=5,renorm",
    "soft:2,topp=0.6,eos",
    "token|rms",
    "zero",
    "random:3|detach",
    "random:1+random:2",
    "last|linear:orthogonal",
    "last|mlp:24,norm_out",
    "last|mlp:phi=silu",
    "last|mlp_plain:16",
    "last|mlp_plain:16,phi=silu,dropout=0.4",
    "last|gate:1",
    "last|gate:1,vector",
    "last|detach",
    "last|rms|noise:0.1",
]
ALL_PARTS = [
    "layer:1+mean:0:2,norm_each,learned+soft:0.7,topk=5,renorm+prev_input"
    "+suppressed:0:,agg=sum,threshold=topk:7"
    "|ln|linear:orthogonal|mlp:8,norm_out|gate:1|rms:learned|noise:0.1",
    "last+hf:-2+depth:0.5+random:1+token+zero+shuffle+suppressed_fork:0.5+suppressed:space=vocab"
    "|detach|final_norm|mlp_plain:8,dropout=0.3",
]
"""Two rules with every part of the catalogue between them."""
CUTS = ("suppressed", "suppressed_fork", "soft")
"""Sources that keep or drop on a threshold, which rounding to bfloat16 crosses here and there."""
ELSEWHERE = {
    "shuffle": "test_shuffle_gives_every_row_the_state_of_another",
    "shuffle.seed": "test_shuffle_gives_every_row_the_state_of_another",
    "soft.straight_through": "test_soft_is_an_embedding_when_cold_and_their_mean_when_hot",
    "soft.stop": "test_a_sure_row_ends_its_latents_after_patience",
    "soft.patience": "test_a_sure_row_ends_its_latents_after_patience",
    "noise.when": "test_noise_follows_its_key_its_schedule_and_when",
    "noise.schedule": "test_noise_follows_its_key_its_schedule_and_when",
    "suppressed.refresh": "test_inverse_is_of_its_own_model_and_follows_its_parameters",
    "linear.lam": "test_a_ridge_is_the_least_squares_map_to_the_next_embedding",
}
"""What the lists of rules here cannot show, and the test that does."""
MARKERS = (TOKENS["start"], TOKENS["end"], TOKENS["latent"])

# Behind each tolerance the largest gap seen on x86-64.
LOGITS = 2e-3
DIFFERENCES = {
    "mlx_coconut": 1e-3,
    "cuda_coconut": 2e-5,
}  # of a tensor's norm; float64 in torch: 4e-6
DIFFERENCE_STEP = 1e-6
TWIN_THOUGHTS, TWIN_GRADIENTS = 1e-4, 1e-3
RECOMPUTED = 1e-3  # of a gradient's norm
BF16, BF16_CUT = 0.1, 0.5  # of the thoughts' norm; seen 0.034 and 0.28
BF16_LOSS = 0.05
FORK_LOSS, FORK_GRADIENTS = 1e-5, 1e-3  # relative; 2.5e-7 and 1.8e-5


def setup_of(rule: str, **changes) -> Setup:
    return Setup(parse(rule), MARKERS, TOKENS["eos"], changes.pop("n_tokens", 200), **changes)


def array(twin, a: np.ndarray):
    if twin.__name__ == "mlx_coconut":
        import mlx.core as mx

        return mx.array(a)
    import torch

    return torch.from_numpy(np.array(a))


def own_weights(rule: str, n_layers: int = 3, width: int = 64) -> dict[str, np.ndarray]:
    """A rule's weights moved away from where they start, at which much of them has no effect."""
    drawn = weights.initial_weights(parse(rule), n_layers, width, 0.2, 0)
    rng = np.random.default_rng(1)
    return {n: w + 0.1 * rng.standard_normal(w.shape).astype("f4") for n, w in drawn.items()}


def load(twin, rule: str, directory=MODEL, own=None):
    """(model, module) with a rule."""
    model, module, _ = twin.weights.load_model(directory)
    trained = None if own is None else {n: array(twin, w) for n, w in own.items()}
    twin.feedback.attach(model, setup_of(rule), trained=trained)
    return model, module


def think(twin, model, batch, key=(0,), training=False):
    """(logits, thoughts) of a batch."""
    prepared = prepare(model, batch, key, training)
    out = twin.latent.latent_forward(
        model, twin.latent.Inputs.of(batch), batch.first_latent, batch.n_passes, prepared=prepared
    )
    return to_numpy(model.head(out.hidden)), [to_numpy(t) for t in out.thoughts]


def thoughts_of(twin, rule, batch, directory=MODEL, own=None) -> np.ndarray:
    return np.array(think(twin, load(twin, rule, directory, own)[0], batch)[1])


# ---- the catalogue


@pytest.mark.slow
def test_every_rule_of_the_catalogue_is_held_to_a_formula():
    """A new source, transform or option fails here until RULES or ELSEWHERE names it."""
    catalogue = SOURCES | TRANSFORMS
    assert sources.SOURCES.keys() == SOURCES.keys()
    assert transforms.TRANSFORMS.keys() == TRANSFORMS.keys() - {"noise"}
    shown, joined = set(), set()
    for text in [*RULES, *ALL_PARTS]:
        rule = parse(text)
        for part in (*rule.parts, *([rule.noise] if rule.noise else [])):
            own = {n for n, v in part.options.items() if v != catalogue[part.name][n].default}
            if text in ALL_PARTS:
                joined.add(part.name)
            else:
                shown |= {part.name} | {f"{part.name}.{option}" for option in own}
    shown.add("suppressed.base")  # a source of its own once it is parsed
    wanted = {*catalogue, *(f"{n}.{o}" for n, options in catalogue.items() for o in options)}
    assert wanted - shown == ELSEWHERE.keys()
    assert joined == catalogue.keys()
    assert all(globals()[test] for test in ELSEWHERE.values())


@pytest.mark.parametrize("rule", few([*RULES, "shuffle"], 4))
def test_every_rule_is_saved_and_read_back_by_both_twins(twin, tmp_path, rule):
    batch, own = ragged_batch(1, (2, 3)), own_weights(rule)
    model, _ = load(twin, rule, own=own)
    twin.weights.save_feedback(model, tmp_path)
    for other in map(load_twin, CHOSEN):
        again, _, _ = other.weights.load_model(MODEL)
        setup = Setup(parse(str(parse(rule))), MARKERS, TOKENS["eos"], 200, is_trained=True)
        other.feedback.attach(again, setup, trained=other.weights.load_feedback(tmp_path))
        found = other.weights.to_numpy(other.weights.feedback_weights(again))
        assert found.keys() == own.keys()
        assert all(np.array_equal(found[name], w) for name, w in own.items())
        if other is twin:
            ours, theirs = (think(twin, m, batch, training=True)[1] for m in (model, again))
            np.testing.assert_array_equal(ours, theirs)


# ---- the strings


@pytest.mark.parametrize("rule", [*RULES, *rules.FORK_ALIASES])
def test_a_rule_is_saved_by_a_string_that_reads_as_the_same_rule(rule):
    parsed = parse(rule)
    assert parse(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("lasst", "unknown source 'lasst', did you mean last?"),
        ("rms", "unknown source 'rms'; it is a transform"),
        ("last|rmss", "unknown transform 'rmss', did you mean rms?"),
        ("soft:tua=1", "soft: unknown argument 'tua', did you mean tau?"),
        ("layer", "layer: needs n, as in layer:-1"),
        ("layer:x", "layer: n: expected a whole number, got 'x'"),
        ("depth:1.5", "depth: f: must be at least 0 and at most 1, got 1.5"),
        ("soft:tau=0", "soft: tau: must be above 0"),
        ("ie+suppressed[0.5:]|rms", "did you mean ie+supressed[0.5:]?"),
        ("last|mlp:2000000", "mlp: hidden: must be at most 1048576"),
        ("last|gate:nan", "gate: c: expected a finite number, got 'nan'"),
        ("soft:1,tau=2", "soft: tau is given twice"),
        ("zero:3", "zero: unknown argument '3'; takes no argument"),
        ("last|noise:0.1|rms", "noise: comes last"),
        ("last|mlp|mlp", "mlp: may occur once"),
        ("suppressed:base=none", "without a base it needs a scale: add |rms"),
        ("suppressed:subset=3", "subset needs space=vocab"),
        ("suppressed:space=vocab,sign=signed", "sign is of the residual space only"),
        ("", "unknown source ''"),
    ],
)
def test_a_wrong_rule_is_refused_with_advice(text, complaint, tmp_path):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert complaint in str(error.value)
    if text:
        with pytest.raises(UserError) as refused:
            run_config(tmp_path, feedback=text)
        assert f"feedback: {error.value}" in str(refused.value)


@pytest.mark.parametrize("rule", ["layer:4", "layer:-5", "mean:2:1", "suppressed:3:", "mean:0:9"])
def test_a_layer_that_the_model_lacks_is_refused(twin, rule):
    assert setup_of(rule).problems(n_layers=3, n_rows=200)
    with pytest.raises(UserError, match="layer"):
        load(twin, rule)


def test_markers_without_a_row_are_refused(twin):
    model, _, _ = twin.weights.load_model(MODEL)
    with pytest.raises(UserError, match="embedding has 200 rows"):
        twin.feedback.attach(model, Setup(parse("soft"), (200, 201, 202), 0, 203))


# ---- the formulas, with cache, batch and padding


def oracle_of(rule, batch, row, own) -> naive_feedback.Thinker:
    made = draws.prepare(parse(rule), batch, 64, (0,), training=True)
    drawn = {name: made[name][:, row] for name in ("noise", "kept") if name in made}
    model = naive.GPT2.load(MODEL)
    return naive_feedback.Thinker(model, setup_of(rule), own, **drawn)


@pytest.mark.parametrize("rule", few(RULES, 8))
def test_cached_ragged_batches_equal_the_formulas_run_uncached(twin, rule):
    batch, own = ragged_batch(1, (0, 1, 3)), own_weights(rule)
    model, _ = load(twin, rule, own=own)
    ours, thoughts = think(twin, model, batch, training=True)
    for i, row in enumerate(rows_of(batch)):
        oracle = oracle_of(rule, batch, i, own)
        x = oracle.inputs(row.ids, TOKENS["latent"])
        for k in range(row.n_latents):
            scale = max(1, np.abs(x[row.first_latent + k]).max())
            gap = np.abs(thoughts[k][i] - x[row.first_latent + k]).max()
            assert gap < LOGITS * scale
        expected = naive_feedback.logits(oracle, row.ids, TOKENS["latent"])
        assert np.abs(ours[i][batch.mask[i]] - expected).max() < LOGITS


def gradients_of(twin, model, module, batch, training=True):
    """Gradients of the summed loss by our own names."""
    prepared = prepare(model, batch, (0,), training)
    inputs = twin.latent.Inputs.of(batch)

    def loss(model):
        plan = (batch.first_latent, batch.n_passes)
        out = twin.latent.latent_forward(model, inputs, *plan, prepared=prepared)
        hidden = out.hidden.reshape(-1, out.hidden.shape[-1])
        hidden = hidden[array(twin, batch.target_index)]
        logits = model.head(hidden)
        if twin.__name__ == "cuda_coconut":  # keeps float64, which the product's loss does not
            import torch.nn.functional as F

            return F.cross_entropy(logits, array(twin, batch.target_ids).long(), reduction="sum")
        target = array(twin, batch.target_ids), array(twin, batch.target_weight)
        return twin.losses.masked_cross_entropy(logits, *target)[0]

    run = mlx_gradients if twin.__name__ == "mlx_coconut" else torch_gradients
    _, grads = run(model, loss)
    return {n: to_numpy(g) for n, g in grads.items() if g is not None}


@pytest.mark.parametrize("rule", few(RULES, 4))
def test_gradient_through_two_latents_equals_finite_differences(twin, rule):
    batch, own = ragged_batch(4, (2,)), own_weights(rule)
    model, module = load(twin, rule, own=own)
    if twin.__name__ == "cuda_coconut":
        model.double()
    grads = gradients_of(twin, model, module, batch)
    (row,) = rows_of(batch)
    oracle = oracle_of(rule, batch, 0, own)

    def loss():
        oracle.replay = list(oracle.record or [])
        return naive_feedback.loss_sum(oracle, row.ids, row.labels, TOKENS["latent"])

    oracle.record = []
    naive_feedback.loss_sum(oracle, row.ids, row.labels, TOKENS["latent"])
    weights = {"wte.weight": oracle.model.weights, "h.1.mlp.c_proj.bias": oracle.model.weights}
    weights |= dict.fromkeys(oracle.own, oracle.own)
    largest = max(np.linalg.norm(g) for g in grads.values())
    for name, store in weights.items():
        g = grads[name if store is oracle.model.weights else f"feedback.{name}"]
        direction = g / max(np.linalg.norm(g), 1e-30)
        direction = direction + np.random.default_rng(0).standard_normal(g.shape) / g.size**0.5
        w, ends = store[name], []
        for step in (DIFFERENCE_STEP, -DIFFERENCE_STEP):
            store[name] = w + step * direction
            ends.append(loss())
        store[name] = w
        slope = (ends[0] - ends[1]) / (2 * DIFFERENCE_STEP)
        scale = max(np.linalg.norm(g), 1e-3 * largest)
        assert abs(slope - (g * direction).sum()) < DIFFERENCES[twin.__name__] * scale, name


# ---- golden


CASES = [case for case in golden("feedback")["results"] if "error" not in case]


@pytest.mark.parametrize("model", sorted({case["model"] for case in CASES}))
@pytest.mark.slow
def test_the_forks_thoughts_hold_where_its_mathematics_is_kept(twin, model):
    arrays = load_file(GOLDEN / "feedback.safetensors")
    batches = {b["name"]: golden_batch(b["inputs"]) for b in golden("feedback")["batches"]}
    for case in (case for case in CASES if case["model"] == model):
        batch = batches[case["batch"]]
        ours = thoughts_of(twin, case["variant"], batch, MODELS / model)
        rows, columns = np.nonzero(batch.is_latent)
        ours = ours[columns - batch.first_latent, rows]
        expected = arrays[case["outputs"]["thoughts"]]
        if case["variant"].startswith("ie+"):
            # The fork adds the embedding of column 0 in every pass; ours that of the source, which
            # is column 0 only for the first latent of this batch.
            assert np.abs(ours[1:] - expected[1:]).max() > 1
            ours, expected = ours[:1], expected[:1]
        np.testing.assert_allclose(ours, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("model", sorted({case["model"] for case in CASES}))
@pytest.mark.slow
def test_the_forks_losses_and_gradients_hold_where_its_mathematics_is_kept(twin, model):
    batches = {b["name"]: golden_batch(b["inputs"]) for b in golden("feedback")["batches"]}
    cases = [c for c in CASES if c["model"] == model and not c["variant"].startswith("ie+")]
    n_gradients = 0
    for case in cases:
        batch, expected = batches[case["batch"]], case["outputs"]
        where = f"{case['variant']} {case['batch']}"
        loaded, module = load(twin, case["variant"], MODELS / model)
        logits = think(twin, loaded, batch)[0].astype(np.float64)
        logits = logits.reshape(-1, logits.shape[-1])[batch.target_index]
        picked = logits[np.arange(len(logits)), batch.target_ids]
        loss = (np.log(np.exp(logits).sum(axis=1)) - picked).mean()
        assert loss == pytest.approx(expected["loss"], rel=FORK_LOSS), where
        if not expected["grad_norms"]:
            continue
        n_gradients += 1
        grads = module.to_hf(dict(gradients_of(twin, loaded, module, batch)))
        ours = {n: np.linalg.norm(g.astype(np.float64)) / batch.n_targets for n, g in grads.items()}
        assert ours == pytest.approx(expected["grad_norms"], rel=FORK_GRADIENTS), where
    assert n_gradients >= 2


# ---- algebra


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("layer:-1|final_norm", "last"),
        ("depth:1", "layer:-1"),
        ("mean:2:2", "layer:2"),
        ("last|linear", "last"),
        ("last|mlp", "last"),
        ("last|mlp:norm_out", "last|rms"),
        ("layer:0", "prev_input"),
        ("suppressed", "last+suppressed:base=none"),
    ],
)
def test_equal_rules_give_equal_thoughts(twin, one, other):
    batch = ragged_batch(2, (2, 1))
    if "base=none" in other:
        assert parse(one) == parse(other)
    ours, theirs = (thoughts_of(twin, rule, batch) for rule in (one, other))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_noise_of_0_is_no_noise():
    assert parse("last|noise:0") == parse("last") and parse("last|noise:0").is_last


def test_soft_is_an_embedding_when_cold_and_their_mean_when_hot(twin):
    batch = ragged_batch(3, (2, 1))
    model, _ = load(twin, "last")
    E = to_numpy(model.embedding).copy()
    cold = thoughts_of(twin, "soft:0.0001", batch)
    hard = thoughts_of(twin, "soft:straight_through", batch)
    graded, hardened = (
        gradients_of(twin, *load(twin, rule), ragged_batch(3, (1,)))
        for rule in ("soft", "soft:straight_through")
    )
    assert graded.keys() == hardened.keys()  # its gradient is taken as if it were soft
    kept = np.setdiff1d(np.arange(200), [*MARKERS, TOKENS["eos"]])
    for thought in cold[0]:
        assert np.abs(E[kept] - thought).max(axis=1).min() < 1e-5
    np.testing.assert_allclose(hard[0], cold[0], atol=1e-5)
    hot = thoughts_of(twin, "soft:1e8", batch)
    np.testing.assert_allclose(hot, np.broadcast_to(E[kept].mean(axis=0), hot.shape), atol=1e-5)


def test_rms_gives_the_scale_of_an_embedding_and_zero_stays_finite(twin):
    batch = ragged_batch(4, (2, 1))
    model, _ = load(twin, "last|rms")
    rho = np.sqrt((to_numpy(model.embedding) ** 2).mean(axis=1)).mean()
    thoughts = np.array(think(twin, model, batch)[1])
    np.testing.assert_allclose(np.sqrt((thoughts**2).mean(axis=-1)), rho, rtol=1e-5)
    model, module = load(twin, "zero|rms")
    grads = gradients_of(twin, model, module, batch)
    assert all(np.isfinite(g).all() for g in grads.values())


def test_token_equals_one_pass_over_the_plain_model(twin):
    batch = ragged_batch(5, (2, 1))
    model, _, _ = twin.weights.load_model(MODEL)
    plain = to_numpy(
        model.head(twin.latent.latent_forward(model, twin.latent.Inputs.of(batch), 0, 0).hidden)
    )
    ours, _ = think(twin, load(twin, "token|linear")[0], batch)
    np.testing.assert_allclose(ours[batch.mask], plain[batch.mask], atol=1e-4)
    assert parse("token").is_token


def test_shuffle_gives_every_row_the_state_of_another(twin):
    batch = ragged_batch(6, (2, 2, 2))
    first = thoughts_of(twin, "hf:-1", batch)[0]
    shuffled = thoughts_of(twin, "shuffle", batch)[0]
    where = [int(np.abs(first - row).max(axis=1).argmin()) for row in shuffled]
    assert sorted(where) == [0, 1, 2] and all(i != j for i, j in enumerate(where))
    with pytest.raises(UserError, match="no other row"):
        thoughts_of(twin, "shuffle", ragged_batch(6, (2,)))
    seeds = [
        draws.prepare(parse(f"shuffle:{seed}"), ragged_batch(6, (2,) * 9), 64, (0,), False)
        for seed in (0, 1)
    ]
    assert (seeds[0]["partners"] != seeds[1]["partners"]).any()


def test_shuffling_equal_rows_is_last_in_thoughts_and_gradients(twin):
    (row,) = rows_of(ragged_batch(6, (2,)))
    batch = collate([row, replace(row, idx=1)], pad_id=TOKENS["eos"])
    shuffled, last = load(twin, "shuffle"), load(twin, "hf:-1")
    ours, theirs = (think(twin, model, batch)[1] for model, _ in (shuffled, last))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    ours, theirs = (gradients_of(twin, *loaded, batch) for loaded in (shuffled, last))
    scale = max(np.linalg.norm(g) for g in theirs.values())
    for name, g in theirs.items():
        limit = TWIN_GRADIENTS * max(np.linalg.norm(g), 1e-3 * scale)
        assert np.linalg.norm(ours[name] - g) < limit, name


def test_noise_follows_its_key_its_schedule_and_when():
    batch = ragged_batch(6, (2, 2))

    def noise(rule, key=(0,), training=True, progress=0.0):
        return draws.prepare(parse(rule), batch, 64, key, training, progress).get("noise")

    first = noise("last|noise:0.2")
    assert first.shape == (2, 2, 64) and 0.15 < first.std() < 0.25
    np.testing.assert_array_equal(first, noise("last|noise:0.2"))
    assert (first != noise("last|noise:0.2", key=(1,))).all()
    assert (first[0] != first[1]).all() and (first[:, 0] != first[:, 1]).all()
    np.testing.assert_array_equal(first, noise("last|noise:0.2", progress=0.75))
    fading = noise("last|noise:0.2,schedule=linear", progress=0.75)
    np.testing.assert_allclose(fading, first / 4, rtol=1e-6)
    assert noise("last|noise:0.2", training=False) is None
    np.testing.assert_array_equal(first, noise("last|noise:0.2,when=always", training=False))


def test_noise_has_the_density_and_divergence_of_a_gaussian(twin):
    rng = np.random.default_rng(0)
    a, reference, thought = rng.standard_normal((3, 4, 8)).astype("f4")
    s = 0.3 * np.sqrt((a**2).mean(axis=-1, keepdims=True))
    normal = -((thought - a) ** 2) / (2 * s**2) - np.log(s) - np.log(2 * np.pi) / 2

    def value_and_slope(function, at):
        if twin.__name__ == "mlx_coconut":
            import mlx.core as mx

            value = function(mx.array(at))
            return np.array(value), np.array(mx.grad(lambda x: function(x).sum())(mx.array(at)))
        x = array(twin, at).requires_grad_()
        value = function(x)
        value.sum().backward()
        return to_numpy(value), np.zeros_like(at) if x.grad is None else to_numpy(x.grad)

    density = partial(measures.noise_log_density, twin.arrays)
    kl = partial(measures.noise_kl, twin.arrays)
    given, mean, other = (array(twin, x) for x in (thought, a, reference))
    value, slope = value_and_slope(lambda x: density(given, x, 0.3), a)
    np.testing.assert_allclose(value, normal.sum(axis=-1), rtol=1e-4)
    np.testing.assert_allclose(slope, (thought - a) / s**2, rtol=1e-4)  # the scale is held
    if twin.__name__ == "mlx_coconut":
        assert not value_and_slope(lambda x: density(x, mean, 0.3), thought)[1].any()
    else:
        assert not density(given.requires_grad_(), mean, 0.3).requires_grad
    value, slope = value_and_slope(lambda x: kl(x, other, 0.3), a)
    np.testing.assert_allclose(slope, (a - reference) / s**2, rtol=1e-4)
    # The mean of log q(u|a) - log q(u|reference) over draws: it is quadratic in u, so one draw a
    # deviation to either side stand for all.
    drawn = np.array([-1, 1])[:, None, None] * s + a
    expected = (
        (((drawn - reference) ** 2 - (drawn - a) ** 2) / (2 * s**2)).sum(axis=-1).mean(axis=0)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_a_ridge_is_the_least_squares_map_to_the_next_embedding(twin):
    rng = np.random.default_rng(0)
    words = np.setdiff1d(np.arange(200), list(TOKENS.values()))
    rows = [Row(i, rng.choice(words, 30 - i).tolist(), None, -1, 0) for i in range(6)]
    model, _ = load(twin, "last|linear:ridge,lam=0.3")
    text = [collate(rows[:4], TOKENS["eos"]), collate(rows[4:], TOKENS["eos"])]
    model.feedback.set_weights(twin.feedback.fitted(model, text))
    oracle = naive.GPT2.load(MODEL)
    E = oracle.weights["wte.weight"]
    H = np.concatenate([oracle.trunk(oracle.embed(row.ids))[:-1] for row in rows])
    next_ones = np.concatenate([E[row.ids[1:]] for row in rows])
    # The bias is not penalised: least squares on sqrt(lam) P stacked below.
    A = np.block([[H, np.ones((len(H), 1))], [np.sqrt(0.3) * np.eye(64), np.zeros((64, 1))]])
    solution = np.linalg.lstsq(A, np.concatenate([next_ones, np.zeros((64, 64))]), rcond=None)[0]
    found = twin.weights.to_numpy(twin.weights.feedback_weights(model))
    # The states come in float32: seen 2e-6.
    np.testing.assert_allclose(found["linear.weight"], solution[:64].T, atol=1e-4)
    np.testing.assert_allclose(found["linear.bias"], solution[64], atol=1e-4)


def test_a_sure_row_ends_its_latents_after_patience(twin):
    (row,) = rows_of(ragged_batch(6, (4,)))
    decoding = Decoding(6, TOKENS["eos"])

    def generated(rule, n):
        ids = [i for i in row.ids if i != TOKENS["latent"]]
        prompt = [*ids[: row.first_latent], *[TOKENS["latent"]] * n, *ids[row.first_latent :]]
        batch = collate([Row(0, prompt, None, row.first_latent, n)], TOKENS["eos"])
        return twin.generate.generate(load(twin, rule)[0], batch, n, decoding)

    assert generated("soft:stop=1e9,patience=2", 4) == generated("soft", 2)
    assert generated("soft:stop=1e-9,patience=2", 4) == generated("soft", 4) != generated("soft", 2)


# ---- suppressed, by hand


HAND = np.array([[4.0, 1.0, 2.0, 3.0], [1.0, -3.0, -1.0, 1.0], [1.0, -3.0, -1.0, 3.0]])
"""Coordinates: shrinking, growing negative, flipping its sign, restored later."""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("sign=magnitude,agg=net", [3, 0, 3, 0]),
        ("sign=signed,agg=net", [3, 4, 3, 0]),
        ("sign=magnitude,agg=sum", [3, 0, 3, 2]),
        ("sign=signed,agg=sum", [3, 4, 3, 2]),
        ("sign=signed,agg=mean", [1.5, 2, 1.5, 1]),
        ("sign=magnitude,value=before,agg=net", [4, 0, 2, 0]),
        ("sign=magnitude,value=after,agg=net", [1, 0, -1, 0]),
        ("sign=magnitude,threshold=topk:1", [3, 0, 0, 0]),
        ("sign=magnitude,threshold=abs:2", [3, 0, 0, 0]),
    ],
)
def test_suppressed_coordinates_are_those_found_by_hand(twin, options, expected):
    part = parse(
        f"suppressed:0:,threshold=abs:0.5,{options}".replace(
            "threshold=abs:0.5," if "threshold" in options else "\0", ""
        )
    ).sources[1]
    thinker = Thinker.__new__(Thinker)
    thinker.xp = twin.arrays
    thinker.layers = {i: array(twin, h[None].astype("f4")) for i, h in enumerate(HAND)}
    thinker.feedback = type("OfTwoLayers", (), {"n_layers": 2})
    np.testing.assert_allclose(to_numpy(sources.suppressed(thinker, part))[0], expected)


# ---- the pseudo-inverse


@pytest.mark.skipif("cuda" not in CHOSEN, reason="TWINS does not name cuda")
def test_the_inverse_is_not_rounded_where_torch_rounds_products():
    import torch

    model, _ = load(load_twin("cuda"), "suppressed:space=vocab")
    with torch.autocast("cpu", torch.bfloat16):
        inside = sources.inverse_of_head(model, 1e-6)
    np.testing.assert_array_equal(inside, sources.inverse_of_head(model, 1e-6))


def test_pseudo_inverse_equals_least_squares_and_undoes_full_rank_only():
    rng = np.random.default_rng(0)
    W, z = rng.standard_normal((200, 16)), rng.standard_normal(200)
    solved = weights.inverse_gram(W.T @ W, 1e-15) @ (W.T @ z)
    np.testing.assert_allclose(solved, np.linalg.lstsq(W, z, rcond=None)[0], atol=1e-12)
    x = rng.standard_normal(16)
    np.testing.assert_allclose(
        weights.inverse_gram(W.T @ W, 1e-15) @ (W.T @ (W @ x)), x, atol=1e-12
    )
    V = W[:, :8] @ rng.standard_normal((8, 16))
    assert np.abs(weights.inverse_gram(V.T @ V, 1e-9) @ (V.T @ (V @ x)) - x).max() > 0.1


def test_inverse_is_of_its_own_model_and_follows_its_parameters(twin):
    rule = "suppressed:space=vocab,refresh=2"
    (one, _), (other, _) = load(twin, rule), load(twin, rule, MODELS / "gpt2-tiny")
    first = one.feedback.inverses.of(one, training=True)
    assert other.feedback.inverses.of(other, training=True) is not first
    other.feedback.inverses, other.feedback.version = one.feedback.inverses, 0
    assert other.feedback.inverses.of(other, training=True) is not first  # another model object
    one, _ = load(twin, rule)
    first = one.feedback.inverses.of(one, training=True)
    fresh = one.feedback.inverses.of(one)
    scaled = array(twin, 2 * to_numpy(one.wte.weight))
    one.wte.weight = scaled if twin.__name__ == "mlx_coconut" else type(one.wte.weight)(scaled)
    one.feedback.version += 1
    assert one.feedback.inverses.of(one, training=True) is first
    assert np.abs(to_numpy(one.feedback.inverses.of(one)) * 4 - to_numpy(fresh)).max() < 1e-4
    one.feedback.version += 1
    assert one.feedback.inverses.of(one, training=True) is not first


# ---- twins


@pytest.mark.skipif(len(CHOSEN) < 2, reason="TWINS names one twin only")
@pytest.mark.parametrize(
    "rule", ["last|mlp:24,norm_out", "soft:0.7,topk=9", "suppressed", "mean|ln", *ALL_PARTS]
)
def test_twins_agree_on_thoughts_and_gradients_of_qwen2(rule):
    batch, own = ragged_batch(7, (2, 1)), own_weights(rule)
    found = []
    for name in ("mlx", "cuda"):
        twin = load_twin(name)
        model, module = load(twin, rule, MODELS / "qwen2-tiny-untied", own)
        thoughts = np.array(think(twin, model, batch)[1])
        found.append((thoughts, gradients_of(twin, model, module, batch)))
    (ours, grads), (theirs, others) = found
    assert np.abs(ours - theirs).max() < TWIN_THOUGHTS * max(1, np.abs(theirs).max())
    assert grads.keys() == others.keys()
    scale = max(np.linalg.norm(g) for g in others.values())
    for name, g in others.items():
        limit = TWIN_GRADIENTS * max(np.linalg.norm(g), 1e-3 * scale)
        assert np.linalg.norm(grads[name] - g) < limit, name


def test_thoughts_are_measured_as_they_are_defined(twin):
    model, _ = load(twin, "last", MODELS / "qwen2-tiny-untied")
    E, W = (to_numpy(w).astype("f8") for w in (model.embedding, model.unembedding))
    rng = np.random.default_rng(0)
    thoughts, sources = rng.standard_normal((3, 2, 64)), rng.standard_normal((2, 3, 64))
    given = [array(twin, t.astype("f4")) for t in thoughts]
    found = measures.measure(
        twin.arrays,
        model,
        given,
        array(twin, sources.astype("f4")),
        measures.Table.of(twin.arrays, model),
    )
    rms = np.sqrt((thoughts**2).mean(axis=-1))
    unit, rows = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (thoughts, E))
    p = naive.softmax(sources.swapaxes(0, 1) @ W.T)
    expected = {
        "scale": rms / np.sqrt((E**2).mean(axis=-1)).mean(),
        "step_cosine": (unit[1:] * unit[:-1]).sum(axis=-1),
        "nearest_cosine": (unit @ rows.T).max(axis=-1),
        "lens_entropy": -(p * np.log(p)).sum(axis=-1),
    }
    assert found.keys() == expected.keys() and np.isnan(found["step_cosine"][0]).all()
    found["step_cosine"] = found["step_cosine"][1:]
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5, err_msg=name)


def test_what_an_evaluation_measures_is_of_the_rows_that_have_the_latent(twin):
    batch = ragged_batch(1, (0, 1, 3))
    source = Source(json.loads((MODEL / "config.json").read_text()), MODEL, 200, range(0), None)
    engine = twin.run.make_backend(RunConfig(method="coconut"), source)
    engine.generate(batch, Decoding(1, TOKENS["eos"]))
    means = engine.statistics.means()
    logits, thoughts = think(twin, engine.model, batch)
    thoughts = np.array(thoughts)
    # Row 1 has one latent, row 2 has three; in both the first stands in the same column.
    first = logits[1:, batch.first_latent - 1]
    p = naive.softmax(first)
    assert means["lens_entropy"][0] == pytest.approx(-(p * np.log(p)).sum() / 2, rel=1e-3)
    rho = np.sqrt((to_numpy(engine.model.embedding) ** 2).mean(axis=-1)).mean()
    scale = np.sqrt((thoughts**2).mean(axis=-1)) / rho
    expected = [scale[0, 1:].mean(), scale[1, 2], scale[2, 2]]
    np.testing.assert_allclose(means["scale"], expected, rtol=1e-4)
    # Two rows lie on a line, one row nowhere.
    assert means["effective_rank"] == [pytest.approx(1, abs=1e-3), None, None]


def test_effective_rank_counts_the_directions_that_are_used_alike():
    def rank(rows):
        statistics = ThoughtStatistics()
        statistics.add_rank(np.array([rows], "f4"), np.ones((len(rows), 1), bool))
        return statistics.means()["effective_rank"][0]

    square = [[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]]
    assert rank(square) == pytest.approx(2)
    flat = [[1, 0, 0], [-1, 0, 0], [0, 0.1, 0], [0, -0.1, 0]]
    assert 1 < rank(flat) < 1.5


# ---- compiled, recomputed, in bfloat16


def one_step(twin, rule, scratch, **options):
    """(StepStats, what AdamW's first moments hold) of a training step by a rule."""
    model, module = load(twin, rule, own=own_weights(rule))
    trainer = twin.train.Trainer(model, weight_decay=0.0, **options)
    stats = trainer.step([ragged_batch(1, (0, 1, 3))], 0.0, (0, 0))
    twin.weights.save_moments(trainer.optimizer, module, scratch)
    moments = load_file(scratch / "optimizer.safetensors")
    return stats, {n: m for n, m in moments.items() if n.startswith("m.")}


@pytest.mark.parametrize("rule", ALL_PARTS)
@pytest.mark.slow
def test_recomputed_blocks_train_every_rule_alike(twin, tmp_path, rule):
    plain, expected = one_step(twin, rule, tmp_path)
    again, found = one_step(twin, rule, tmp_path, checkpointing=True)
    assert again.loss == pytest.approx(plain.loss, rel=1e-5)
    assert_same_gradients(found, expected, RECOMPUTED)
    half, rounded = one_step(twin, rule, tmp_path, bf16=True, checkpointing=True)
    # Every weight is still reached, in float32; how near is the next test's question.
    assert half.loss == pytest.approx(plain.loss, rel=BF16_LOSS)
    assert rounded.keys() == expected.keys()
    for name, g in rounded.items():
        assert g.dtype == np.float32 and np.isfinite(g).all()
        assert g.any() == expected[name].any(), name


@pytest.mark.skipif("mlx" not in CHOSEN, reason="torch compiles nothing here")
@pytest.mark.compiled
def test_a_compiled_loss_is_that_of_the_rule():
    import mlx.core as mx

    twin, batch = load_twin("mlx"), ragged_batch(1, (0, 1, 3))
    model, _ = load(twin, "layer:1|rms:learned|noise:0.1,when=always")
    trainer = twin.train.Trainer(model, weight_decay=0.0)
    compiled = trainer.loss(batch).loss_sum
    assert trainer.n_traces == 1
    mx.disable_compile()
    try:
        plain = twin.train.Trainer(model, weight_decay=0.0).loss(batch).loss_sum
    finally:
        mx.enable_compile()
    assert compiled == pytest.approx(plain, rel=1e-5)


@pytest.mark.skipif("mlx" not in CHOSEN, reason="torch compiles nothing here")
@pytest.mark.parametrize("rule", ALL_PARTS)
@pytest.mark.compiled
def test_a_rule_asks_for_no_value_while_it_is_traced(rule):
    """Traced, not run: compiling kernels for every part would take minutes of a cold cache."""
    import mlx.core as mx

    twin, batch = load_twin("mlx"), ragged_batch(1, (0, 1, 3))
    trainer = twin.train.Trainer(load(twin, rule)[0], weight_decay=0.0, checkpointing=True)
    prepared = trainer._prepare(batch, (0, 0), training=True)
    key = mx.random.key(0)
    loss, _ = trainer._call(trainer._micro, trainer._gradients, batch, prepared, key)
    assert loss.shape == () and trainer.n_traces == 1


@pytest.mark.parametrize("rule", few([*RULES, "shuffle"], 4))
def test_thoughts_in_bfloat16_are_near_those_in_float32(twin, rule):
    batch, thoughts = ragged_batch(1, (0, 1, 3)), []
    has = batch.is_latent.T[batch.first_latent : batch.first_latent + batch.n_passes]
    is_cut = any(part.name in CUTS for part in parse(rule).sources)
    for bf16 in (False, True):
        model, _ = load(twin, rule, own=own_weights(rule))
        with twin.train.Trainer(model, weight_decay=0.0, bf16=bf16).compute_weights():
            found = twin.latent.thoughts_of(model, batch, batch.n_passes)
        # Behind the first thought a cut that fell otherwise is another question.
        thoughts.append(found[0][has[0]] if is_cut else found[has])
    gap, size = np.linalg.norm(thoughts[0] - thoughts[1]), np.linalg.norm(thoughts[0])
    assert gap <= (BF16_CUT if is_cut else BF16) * size


# ---- in a run


@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
@pytest.mark.slow
def test_a_run_goes_back_to_a_rule_it_saved(twin, tmp_path, lora):
    setup, base = setup_of("layer:2|mlp:8"), str(MODEL)
    adapter = lora and Adapter(lora, MARKERS, base, fingerprint(MODEL), range(0), None)
    described = json.loads((MODEL / "config.json").read_text())
    source = Source(described, MODEL, 200, range(0), None, feedback=setup, adapter=adapter)
    engine = twin.run.make_backend(RunConfig(method="coconut"), source)
    batch = ragged_batch(0, (2, 1))
    engine.train_step([batch], 1e-2, (0, 0))
    engine.save(tmp_path, with_optimizer=False)
    saved = engine.eval_loss(batch).loss_sum
    engine.train_step([batch], 1e-2, (0, 1))
    assert abs(engine.eval_loss(batch).loss_sum - saved) > 1e-2
    engine.restore(tmp_path)
    assert engine.eval_loss(batch).loss_sum == saved
    (tmp_path / "feedback.safetensors").unlink()
    with pytest.raises(UserError, match="needs the weights"):
        engine.restore(tmp_path)


@pytest.mark.parametrize(
    "rule", ["last|noise:0.1", "shuffle", "soft:stop=0.5", "suppressed:space=vocab"]
)
def test_latro_refuses_what_it_cannot_score_again(rule):
    assert parse(rule).unscored
    config = SimpleNamespace(method="latro", has_latents=True, feedback=rule, where="a.yaml")
    tokenizer = SimpleNamespace(start_id=1, end_id=2, latent_id=3)
    with pytest.raises(UserError, match=r"a\.yaml: .*latro cannot score"):
        _feedback(config, {}, None, tokenizer, None)


@pytest.mark.slow
def test_rule_and_weights_are_saved_loaded_strictly_and_resumed(twin, tmp_path):
    rule = "last|mlp:8,norm_out|noise:0.1"
    keys = {"feedback": rule, "reset_optimizer": "never", "feedback_lr_multiplier": 2.0}
    whole = run_config(tmp_path, name="whole", num_epochs=3, **keys)
    start(twin, whole).train()
    parts = run_config(tmp_path, name="parts", num_epochs=2, **keys)
    start(twin, parts).train()
    parts = run_config(tmp_path, name="parts", num_epochs=3, **keys)
    start(twin, parts).train()
    a, b = (load_file(c.run_dir / "epoch_03/feedback.safetensors") for c in (whole, parts))
    assert {n for n in a if "w2" in n} == {"feedback.mlp.w2"} and np.any(a["feedback.mlp.w2"])
    assert_same_updates(b, a, 2.0 * whole.lr)
    made = json.loads((whole.run_dir / "epoch_03/coconut.json").read_text())
    assert made["feedback"] == rule
    summary = json.loads((whole.run_dir / "summary.json").read_text())
    assert summary["thoughts"]["scale"] == read_log(whole, "thoughts")[-1]["scale"]
    again = {"load_model_path": str(whole.run_dir / "epoch_03"), "only_eval": True}
    again |= {"model_config_path": None, "tokenizer": None, "name": "again"}
    start(twin, run_config(tmp_path, **again)).evaluate_once()  # by the checkpoint's own rule
    with pytest.raises(UserError, match=r"was trained with feedback .*replace_feedback"):
        start(twin, run_config(tmp_path, feedback="last", **again))
    # Without the noise it is the same rule's weights that are read.
    quiet = run_config(
        tmp_path, feedback="last|mlp:8,norm_out", replace_feedback=True, **again | {"name": "quiet"}
    )
    start(twin, quiet).evaluate_once()
    loud, still = (
        json.loads((whole.run_dir.parent / name / "summary.json").read_text())["thoughts"]
        for name in ("again", "quiet")
    )
    assert still == loud
    replaced = run_config(tmp_path, feedback="last", replace_feedback=True, **again)
    start(twin, replaced).evaluate_once()
    weights = whole.run_dir / "epoch_03/feedback.safetensors"
    weights.unlink()
    (whole.run_dir / "epoch_03/checksums.json").unlink()
    with pytest.raises(UserError, match="needs the weights"):
        start(twin, run_config(tmp_path, **again))


LEARNING = [
    "last",
    "soft",
    "last+prev_input|rms:learned",
    "mean:0:2,norm_each,learned|rms",
    "last|linear",
    pytest.param("last|mlp:16", marks=pytest.mark.compiled),
    "last|mlp_plain:16",
    "last|gate",
]


@pytest.mark.slow
@pytest.mark.parametrize("rule", few(LEARNING, 1))
def test_a_few_updates_lower_the_loss_and_move_the_weights_of_the_rule(twin, tmp_path, rule):
    runner = start(twin, run_config(tmp_path, feedback=rule))
    batch = runner._batch(runner.data.samples(0), np.arange(8), 0, 2, 0, 8)
    assert batch.n_passes > 0
    runner.console.close()
    model, weights = runner.backend.model, twin.weights
    before = weights.to_numpy(weights.feedback_weights(model))
    assert bool(before) == (rule not in ("last", "soft"))
    losses = [runner.backend.train_step([batch], 3e-3, (0, 0, i)).loss for i in range(8)]
    # Nats a label; seen to fall from 8.4 to between 1.1 and 1.3.
    assert losses[-1] < losses[0] / 2
    after = weights.to_numpy(weights.feedback_weights(model))
    assert all(np.abs(after[name] - before[name]).max() > 1e-4 for name in before)
