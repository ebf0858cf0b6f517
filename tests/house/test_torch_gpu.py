"""The torch twin on a GPU: what the host waits for, told on any machine; results, on a GPU.

python -m pytest -m gpu        what a machine with an NVIDIA GPU runs besides
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from conftest import CHOSEN, few, load_twin
from golden_models import MODELS, TOKENS, as_row, golden, golden_batch, ragged_batch
from test_feedback import RULES
from tiny import MODEL, dropout, model_directory, run_config, start

from coconut.batches.batch import Batch, collate
from coconut.batches.decoding import Decoding
from coconut.batches.rollouts import Rollout, collate_rollouts
from coconut.checkpoints.adapters import Adapter
from coconut.config.lora_keys import Lora
from coconut.config.methods import DATASET_METHODS, METHODS
from coconut.feedback.rules import parse
from coconut.feedback.weights import Setup
from coconut.world import World

if "cuda" not in CHOSEN:
    pytest.skip("of the torch twin alone", allow_module_level=True)

TWIN = load_twin("cuda")
DEVICE = "cuda"
EOS, MARKERS = TOKENS["eos"], (TOKENS["start"], TOKENS["end"], TOKENS["latent"])


@pytest.fixture
def waits(monkeypatch) -> Callable[[], Any]:
    from waits import Waits  # imports torch

    @contextmanager
    def watched() -> Iterator[Any]:
        with monkeypatch.context() as patch, Waits(patch) as mode:
            yield mode

    return watched


def assert_waits_at_the_end_alone(mode: Any) -> None:
    """It reads once, and there is nothing left to compute."""
    assert mode.found and set(mode.found) <= {"tolist", "item", "_local_scalar_dense"}, mode.found
    assert mode.computed_after == []


def model_of(name: str = "gpt2-tiny", rule: str = "last"):
    model, _, _ = TWIN.weights.load_model(MODELS / name)
    TWIN.feedback.attach(model, Setup(parse(rule), MARKERS, EOS, n_tokens=200))
    return model


def two_updates(model, waits, batch: Batch | None = None, **options: Any) -> Any:
    """The waits of the second of two updates; the first makes the optimizer's state."""
    trainer = TWIN.train.Trainer(model, weight_decay=0.01, max_grad_norm=0.5, **options)
    batches = [batch or ragged_batch(1), batch or ragged_batch(2)]
    trainer.step(batches, 1e-3, (0, 0))
    with waits() as mode:
        trainer.step(batches, 1e-3, (0, 1), progress=0.5)
    return mode


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (lambda torch, x: x.sum().item(), "item"),
        (lambda torch, x: x.cpu(), "cpu"),
        (lambda torch, x: x[x > 0], "index by a mask"),
        (lambda torch, x: operator.setitem(x, x > 0, torch.zeros(())), "index_put_ by a mask"),
        (lambda torch, x: x.nonzero(), "nonzero"),
        (lambda torch, x: x.masked_select(x > 0), "masked_select"),
        (lambda torch, x: 1 if x.sum() > 0 else 0, "__bool__"),
        (lambda torch, x: x * torch.tensor([1.0, 2.0, 3.0]), "lift_fresh"),
        (lambda torch, x: x + torch.from_numpy(np.ones(3)), "from_numpy"),
        (lambda torch, x: torch.linalg.inv(x.diag()), "_linalg_check_errors"),
    ],
)
def test_waits_are_seen(waits, act, name):
    import torch

    with waits() as mode:
        act(torch, torch.ones(3))
    assert name in mode.found


@pytest.mark.parametrize("name", ["gpt2-tiny", "qwen2-tiny-deep"])
@pytest.mark.parametrize("options", few([{}, {"bf16": True}, {"checkpointing": True}], 1), ids=str)
def test_an_update_makes_the_host_wait_once_at_its_end(waits, name, options):
    assert_waits_at_the_end_alone(two_updates(model_of(name), waits, **options))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"checkpointing": True}], ids=str)
def test_dropout_never_waits(waits, tmp_path, options):
    rates = dropout(embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)
    model, _, _ = TWIN.weights.load_model(model_directory(tmp_path / "model", **rates))
    assert_waits_at_the_end_alone(two_updates(model, waits, **options))


@pytest.mark.parametrize("rule", few(RULES, 3))
def test_a_rule_waits_for_nothing(waits, rule):
    # The inverse that `suppressed:space=vocab` needs is made on the host, where `refresh` says so:
    # here in the first update, as of an epoch.
    batch = ragged_batch(1, (1, 3, 2))
    assert_waits_at_the_end_alone(two_updates(model_of(rule=rule), waits, batch))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_never_waits(waits, kind):
    model, _, config = TWIN.weights.load_model(MODEL)
    lora = Lora(rank=2, type=kind, dropout=0.1)
    TWIN.adapters.adapt(model, config, Adapter(lora, MARKERS, str(MODEL), "", range(0), None))
    assert_waits_at_the_end_alone(two_updates(model, waits))


@pytest.mark.parametrize("method", few([m for m in METHODS if m not in DATASET_METHODS], 2))
def test_every_method_s_update_waits_once(waits, tmp_path, method):
    runner = start(TWIN, run_config(tmp_path, method=method, resume=1))
    step, seen = runner.backend.train_step, []

    def watched(*args: Any) -> Any:
        with waits() as mode:
            stats = step(*args)
        seen.append(mode)
        return stats

    runner.backend.train_step = watched
    runner.train()
    (mode,) = seen
    assert_waits_at_the_end_alone(mode)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_policy_update_waits_at_its_end(waits, checkpointing):
    policy = TWIN.latro.Policy(
        TWIN.train.Trainer(model_of(), weight_decay=0.0, checkpointing=checkpointing)
    )
    batches = [rollouts(), rollouts()]
    policy.step(batches, 1e-3)
    with waits() as mode:
        policy.step(batches, 1e-3)
    assert set(mode.found) == {"item", "_local_scalar_dense", "cpu", "numpy"}
    assert mode.computed_after == []


def rollouts():
    """Two rationales of different lengths, each with its answer."""
    rows = [Rollout([9, 8, 7], [], said, [5], [6, EOS], 0, True) for said in ([11, 12], [13])]
    return collate_rollouts(rows, TOKENS["latro_pad"], advantages=[1.0, -1.0], n_rows=2)


def test_decoding_waits_once_a_token(waits):
    model = model_of()
    batch = collate([as_row(0, [9, 8, 7], None), as_row(1, [9, 8], None)], EOS)
    with waits() as mode:
        found = TWIN.generate.generate(model, batch, 0, Decoding(5, eos_id=-1))
    assert [len(row) for row in found] == [5, 5]
    # Here, where nothing is queued; on a GPU once for several, see test_generation.py.
    assert mode.found == ["cpu", "numpy"] * 5


# ---- on a GPU

LOSS = 1e-4  # relative, of golden losses in float32: sums in another order
BF16 = 0.02  # relative, of losses beside float32: 8 bits of mantissa, averaged over labels


def on_gpu(name: str = "gpt2-tiny"):
    return model_of(name).to(DEVICE)


@contextmanager
def no_waiting() -> Iterator[None]:
    """CUDA's own watch: raises where the host waits, but for the one `tolist` of an update."""
    import torch

    tolist = torch.Tensor.tolist

    def allowed(tensor: torch.Tensor) -> list:
        torch.cuda.set_sync_debug_mode("default")
        return tolist(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", allowed)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("case", golden("forward"), ids=lambda case: case["name"])
def test_golden_losses_on_a_gpu(case):
    batch = golden_batch(case["inputs"])
    for name, expected in case["outputs"].items():
        trainer = TWIN.train.Trainer(on_gpu(name), weight_decay=0.0)
        loss = trainer.loss(batch).loss_sum / batch.n_targets
        assert loss == pytest.approx(expected["loss_float64"], rel=LOSS), name


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gpt2-tiny", "qwen2-tiny"])
def test_bfloat16_stays_near_float32_and_keeps_float32_weights(name):
    import torch

    losses = {}
    for bf16 in (False, True):
        trainer = TWIN.train.Trainer(on_gpu(name), weight_decay=0.01, bf16=bf16)
        losses[bf16] = [
            trainer.step([ragged_batch(1)], 1e-3, (0, number)).loss for number in range(5)
        ]
        kept = {w.dtype for w in trainer.model.parameters()}
        kept |= {s["exp_avg"].dtype for s in trainer.optimizer.state.values()}
        assert kept == {torch.float32}
    assert losses[True] == pytest.approx(losses[False], rel=BF16)
    assert losses[True] != losses[False]


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"checkpointing": True}], ids=str)
def test_cuda_itself_sees_no_wait_in_an_update(tmp_path, options):
    rates = dropout(embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)
    model, _, _ = TWIN.weights.load_model(model_directory(tmp_path / "model", **rates))
    trainer = TWIN.train.Trainer(model.to(DEVICE), weight_decay=0.01, max_grad_norm=0.5, **options)
    trainer.step([ragged_batch(1)], 1e-3, (0, 0))
    with no_waiting():
        stats = trainer.step([ragged_batch(1), ragged_batch(2)], 1e-3, (0, 1))
    assert np.isfinite(stats.loss)


@pytest.mark.gpu
@pytest.mark.parametrize("case", golden("generate"), ids=lambda c: f"{c['model']}-{c['name']}")
def test_a_gpu_writes_the_tokens_of_a_cpu(case):
    inputs = case["inputs"]
    batch = collate([as_row(0, inputs["input_ids"], None)], EOS)
    n_passes = batch.n_passes * (case["kind"] == "coconut")
    decoding = Decoding(inputs["max_new_tokens"], inputs["eos_token_id"])
    ours, theirs = (
        TWIN.generate.generate(model, batch, n_passes, decoding)
        for model in (on_gpu(case["model"]), model_of(case["model"]))
    )
    assert ours == theirs


@pytest.mark.gpu
def test_a_world_of_nccl_sums_and_shards(monkeypatch):
    import torch

    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    one = TWIN.world.Processes()
    try:
        assert one.gather(b"bytes") == [b"bytes"]
        assert one.sum(torch.ones(3, device=DEVICE)).tolist() == [1, 1, 1]
        stats = []
        for is_sharded in (False, True):
            options = {"weight_decay": 0.01, "max_grad_norm": 0.5, "shard": is_sharded}
            trainer = TWIN.train.Trainer(on_gpu(), world=one if is_sharded else World(), **options)
            stats.append([trainer.step([ragged_batch(1)], 1e-3, (0, n)) for n in range(3)])
            if is_sharded:
                weight = trainer.model.wte.weight
                assert isinstance(weight, torch.distributed.tensor.DTensor)
        for ours, theirs in zip(*stats, strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=LOSS)
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=LOSS)
    finally:
        one.close()
