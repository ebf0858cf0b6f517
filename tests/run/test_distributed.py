"""Several processes compute what one computes: losses, weights, answers; and end together.

    LAUNCHER tests/run/test_distributed.py TWIN FOLDER

is what each of two launched processes does: the runs of `PAIR`, one after another.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHOSEN, load_twin
from safetensors.numpy import load_file
from test_latro_runner import config as latro_config
from tiny import REPOSITORY, data_set_config, read_log, run_config, start, write_items

import coconut.run.curriculum_loop
from coconut.commands.run import main
from coconut.config.keys import RunConfig
from coconut.errors import UserError
from coconut.lock import held
from coconut.run.curriculum_loop import Runner
from coconut.run.latro.loop import LatroRunner
from coconut.world import AgreedError, World

# Seen on x86 CPUs: 2.6e-6 between weights, 1.3e-7 between gradient norms (1.5e-6 sharded, whose
# squares are summed by process) and 4e-8 between evaluation losses, relative. Adam divides by the
# root of the second moment: where a gradient is near zero, its float noise moves a weight by a
# visible part of a step. So weights are compared in steps, gradients by their norms and moments,
# which keep their scale.
STEP = 1e-3  # the learning rate at its peak
WEIGHTS = 0.03 * STEP  # absolute, after six updates
MOMENTS = 2e-6  # absolute, beside 1e-4 of the value
LOSS = 1e-5  # relative
RUNS = 1e-4  # relative and absolute, of what runs on data sets report; none seen of two summands
N_ITEMS = 10
MODEL = {
    "model_type": "gpt2",
    "n_positions": 256,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "resid_pdrop": 0.1,
}


def config_of(folder: Path, name: str, n_processes: int, **keys: Any) -> RunConfig:
    """Two epochs of three updates; the last of each has one micro-batch: none for process 1."""
    (folder / "model.json").write_text(json.dumps(MODEL))
    if not (folder / "train.json").exists():
        write_items(folder / "train.json", N_ITEMS)
        write_items(folder / "val.json", 6, seed=8)
    values = {
        "name": name,
        "model_config_path": str(folder / "model.json"),
        "batch_size_training": 2,
        "gradient_accumulation_steps": 2 // n_processes,
        "eval_batch_size": 4,
        "stage_mixing": "batch",
        "max_latent_stage": 2,
        "resume": 1,
        "num_epochs": 3,
        "save_every": 1,
        "warmup_updates": 3,
        "max_grad_norm": 0.5,
    }
    return run_config(folder, **values | keys)


def latro_of(folder: Path, n_processes: int) -> RunConfig:
    """Three updates of two micro-batches behind two supervised ones; three parts are sampled."""
    keys = {"gradient_accumulation_steps": 2 // n_processes, "warm_start_updates": 2}
    keys |= {"eval_batch_size": 3, "save_steps": 2, "test_at_end": True}
    return latro_config(folder / "latro", run_name=f"latro-{n_processes}", **keys)


def cold_latro_of(folder: Path, n_processes: int) -> RunConfig:
    """One update of four micro-batches, the first thing that is trained."""
    keys = {"gradient_accumulation_steps": 4 // n_processes, "warm_start_updates": 0}
    keys |= {"total_updates": 1, "rollout_batch_size": 8, "num_evaluations": 0}
    return latro_config(folder / "latro", run_name=f"cold-{n_processes}", **keys)


def clipped_latro_of(folder: Path, n_processes: int) -> RunConfig:
    """Two optimizer updates a rollout, with every further term of the loss and a new reference."""
    keys = {"gradient_accumulation_steps": 2 // n_processes, "warm_start_updates": 2}
    keys |= {"total_updates": 2, "num_evaluations": 0, "num_iterations": 2, "kl_in": "loss"}
    keys |= {"reward": "mix", "penalty_mode": "mask", "entropy_coef": 0.1, "reference_every": 1}
    return latro_config(folder / "latro", run_name=f"clipped-{n_processes}", **keys)


def on_questions(folder: Path, name: str, **keys: Any) -> RunConfig:
    """A run over the first items of a made data set."""
    return data_set_config(folder / "questions", name=name, **keys)


def sft_of(folder: Path, n_processes: int) -> RunConfig:
    keys = {"batch_size_training": 3, "gradient_accumulation_steps": 2 // n_processes}
    keys |= {"num_epochs": 2, "lr": 0.01, "eval_batch_size": 4, "test_at_end": True}
    keys |= {"report": False}
    return on_questions(folder, f"sft-{n_processes}", method="sft", **keys)


def asked_of(folder: Path, n_processes: int) -> RunConfig:
    """Greedy answers, votes and exchanged rationales, in batches of five."""
    keys = {"method": "latro", "only_eval": True, "maj_k": 2, "rationale_check": True}
    keys |= {"eval_batch_size": 5, "rollout_batch_size": 4}
    return on_questions(folder, f"asked-{n_processes}", **keys)


def preexperiment_of(folder: Path, n_processes: int) -> RunConfig:
    keys = {"method": "preexperiment", "rollout_batch_size": 4}
    return on_questions(folder, f"pre-{n_processes}", **keys)


DATA_SETS = (latro_of, cold_latro_of, clipped_latro_of, sft_of, asked_of, preexperiment_of)
"""Configurations of runs on data sets, by folder and number of processes."""


# ---- what the two processes do


def same_run(twin: Any, folder: Path) -> None:
    run(twin, config_of(folder, "two", 2))


def made_data(twin: Any, folder: Path) -> None:
    """Its training file is missing at first; both need it."""
    made = {"items": 4, "nodes": 16, "max_hops": 4}
    path = str(folder / "made.json")
    run(twin, config_of(folder, "made", 2, train_path=path, generate=made, num_epochs=2))


def second_leg(twin: Any, folder: Path) -> None:
    """Continues what one process began, stopped inside its first epoch."""
    run(twin, config_of(folder, "relay", 2, num_epochs=2))


def another_batch_inside_an_epoch(twin: Any, folder: Path) -> None:
    run(twin, config_of(folder, "stopped", 1))


def error_in_one(twin: Any, folder: Path) -> None:
    """Process 1 cannot read its validation data; process 0 is waiting for it elsewhere."""
    read_items = coconut.run.curriculum_loop.read_items

    def fail(path):
        if os.environ["RANK_HERE"] == "1":
            raise UserError(str(path), "item 3: no question")
        return read_items(path)

    coconut.run.curriculum_loop.read_items = fail
    try:
        run(twin, config_of(folder, "error", 2))
    finally:
        coconut.run.curriculum_loop.read_items = read_items


def taken_by_another(twin: Any, folder: Path) -> None:
    run(twin, config_of(folder, "taken", 2))


def disk_refuses_the_first(twin: Any, folder: Path) -> None:
    save = twin.backend.Backend.save

    def full(backend, directory, with_optimizer):
        if directory is not None:
            raise OSError(28, "No space left on device")
        return save(backend, directory, with_optimizer)

    twin.backend.Backend.save = full
    try:
        run(twin, config_of(folder, "full", 2))
    finally:
        twin.backend.Backend.save = save


def diverged(twin: Any, folder: Path) -> None:
    run(twin, config_of(folder, "diverged", 2, lr=1e30, max_grad_norm=0.0, save_every=0))


def runs_on_data_sets(twin: Any, folder: Path) -> None:
    for path in sorted(folder.glob("data_set_*.yaml")):
        main(twin.__name__, twin.run.make_backend, [str(path)], twin.run.make_world)


def latro_with_another_batch(twin: Any, folder: Path) -> None:
    """Continues in an updates' size of four rows instead of eight."""
    keys = {"gradient_accumulation_steps": 1, "rloo_k": 2, "per_device_train_batch_size": 2}
    keys |= {"warm_start_updates": 2}
    run(twin, latro_config(folder / "latro", run_name="latro-2", **keys))


def sharded(twin: Any, folder: Path) -> None:
    """What `same_run` does, with weights, gradients and moments spread over the processes."""
    seen = noted_shares(twin) if twin.__name__ == "cuda_coconut" else None
    run(twin, config_of(folder, "sharded", 2, shard=True))
    if seen:
        (folder / f"shares_{os.environ['RANK_HERE']}.json").write_text(json.dumps(seen))


def noted_shares(twin: Any) -> list[dict[str, int]]:
    """Notes at every update how many numbers of each kind this process holds."""
    update, seen = twin.train.Trainer.update, []

    def n_numbers(tensors: Any) -> int:
        return sum(twin.shard.own_part(t).numel() for t in tensors)

    def noted(trainer: Any, lr: float) -> Any:
        weights = list(trainer.model.parameters())
        held = {"weights": n_numbers(weights), "gradients": n_numbers(w.grad for w in weights)}
        norm = update(trainer, lr)
        for kind in ("exp_avg", "exp_avg_sq"):
            held[kind] = n_numbers(s[kind] for s in trainer.optimizer.state.values())
        seen.append(held)
        return norm

    twin.train.Trainer.update = noted
    return seen


def passed_on(twin: Any, folder: Path) -> None:
    """Two sharded processes, then one stopped inside the next epoch, then two sharded again."""
    run(twin, config_of(folder, "passed", 2, shard=True, num_epochs=2))
    if os.environ["RANK_HERE"] == "0":  # the other waits for it in the run below
        stop_after(start(twin, config_of(folder, "passed", 1)), 1)
    run(twin, config_of(folder, "passed", 2, shard=True))


def disk_refuses_the_first_of_sharded(twin: Any, folder: Path) -> None:
    write_tensors = twin.weights.write_tensors

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    twin.weights.write_tensors = full
    try:
        run(twin, config_of(folder, "full_sharded", 2, shard=True))
    finally:
        twin.weights.write_tensors = write_tensors


def error_in_the_configuration(twin: Any, folder: Path) -> None:
    (folder / "wrong.yaml").write_text("c_thougt: 2")
    main(twin.__name__, twin.run.make_backend, [str(folder / "wrong.yaml")], twin.run.make_world)


PAIR = (
    same_run,
    made_data,
    second_leg,
    another_batch_inside_an_epoch,
    error_in_one,
    taken_by_another,
    disk_refuses_the_first,
    diverged,
    runs_on_data_sets,
    latro_with_another_batch,
    error_in_the_configuration,
)
SHARDED = (sharded, passed_on, disk_refuses_the_first_of_sharded)
"""What only torch does."""


def run(twin: Any, config: RunConfig) -> None:
    path = Path(config.save_path) / f"{config.name}.{os.environ['RANK_HERE']}.yaml"
    path.write_text(config.to_yaml())
    main(twin.__name__, twin.run.make_backend, [str(path)], twin.run.make_world)


def child(name: str, folder: Path) -> None:
    """Do all of `PAIR` and `SHARDED`; writes what this process said and ended with, and weights."""
    twin = load_twin(name)
    rank = os.environ["RANK_HERE"] = os.environ.get("MLX_RANK", os.environ.get("RANK", ""))
    # A run opens its world once; torch cannot open it again while another process still closes it.
    world = twin.run.make_world()
    close, world.close = world.close, lambda: None
    twin.run.make_world = lambda: world
    seen: dict[str, Any] = {}
    weights: list[str] = []

    def keeping(train: Callable[[Any], None]) -> Callable[[Any], None]:
        def keep(runner: Any) -> None:
            train(runner)
            every = runner.backend.weights()
            weights.append(b"".join(every[n].tobytes() for n in sorted(every)).hex())

        return keep

    Runner.train, LatroRunner.train = keeping(Runner.train), keeping(LatroRunner.train)
    for act in PAIR + SHARDED if name == "cuda" else PAIR:
        out, err, status = StringIO(), StringIO(), 0
        with redirect_stdout(out), redirect_stderr(err):
            try:
                act(twin, folder)
            except SystemExit as end:
                status = end.code
        seen[act.__name__] = {"out": out.getvalue(), "err": err.getvalue(), "status": status}
    (folder / f"process_{rank}.json").write_text(json.dumps({"seen": seen, "weights": weights}))
    close()


# ---- the tests


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launcher(name: str, n: int = 2) -> list[str]:
    """The command that starts n processes of a twin on this machine."""
    folder = Path(sys.executable).parent
    if name == "mlx":
        port = ["--starting-port", str(free_port())]
        return [str(folder / "mlx.launch"), "-n", str(n), *port, "--", sys.executable]
    port = ["--master-port", str(free_port())]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), *port]


def stop_after(runner: Runner, n_updates: int) -> None:
    """Train until so many updates are done and saved, as an interrupted run."""
    step, done = runner.backend.train_step, []

    def counted(*args):
        if len(done) == n_updates:
            raise KeyboardInterrupt
        done.append(1)
        return step(*args)

    runner.backend.train_step = counted
    with suppress(KeyboardInterrupt), runner.console:
        runner.train()


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Callable[[str], tuple[Path, list[dict[str, Any]]]]:
    """twin -> (folder, what each of two launched processes wrote down)."""

    @cache
    def launch(name: str) -> tuple[Path, list[dict[str, Any]]]:
        folder = tmp_path_factory.mktemp(name)
        twin = load_twin(name)
        (folder / "runs").mkdir()
        (folder / "questions").mkdir()
        for i, config_of_run in enumerate(DATA_SETS):
            (folder / f"data_set_{i}.yaml").write_text(config_of_run(folder, 2).to_yaml())
        stop_after(start(twin, config_of(folder, "relay", 1)), 2)
        stop_after(start(twin, config_of(folder, "stopped", 2)), 2)
        with held(folder / "runs/taken"):
            done = subprocess.run(
                [*launcher(name), __file__, name, str(folder)],
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=900,  # seconds: the two may have to share one busy core
            )
        found = [folder / f"process_{rank}.json" for rank in (0, 1)]
        assert all(path.exists() for path in found), done.stdout + done.stderr
        return folder, [json.loads(path.read_text()) for path in found]

    return launch


@pytest.fixture(scope="module")
def alone(pair) -> Callable[[str], RunConfig]:
    """twin -> the configuration of the same run done by one process."""

    @cache
    def train(name: str) -> RunConfig:
        config = config_of(pair(name)[0], "one", 1)
        start(load_twin(name), config).train()
        return config

    return train


def assert_same_run(ours: RunConfig, expected: RunConfig) -> None:
    """Equal losses, norms, weights and moments to float noise, equal answers and counts."""
    steps, theirs = (
        {(r["epoch"], r["step"]): r for r in read_log(c, "train")} for c in (ours, expected)
    )
    assert list(steps) == list(theirs) and len(steps) == 6
    for key, record in theirs.items():
        for name in ("loss", "grad_norm", "lr"):
            assert steps[key][name] == pytest.approx(record[name], rel=LOSS), (key, name)
    for file, atol in (("model.safetensors", WEIGHTS), ("optimizer.safetensors", MOMENTS)):
        a, b = (load_file(c.run_dir / "epoch_03" / file) for c in (ours, expected))
        assert a.keys() == b.keys()
        for name, w in b.items():
            np.testing.assert_allclose(a[name], w, rtol=1e-4, atol=atol, err_msg=name)
    a, b = (json.loads((c.run_dir / "evaluations.json").read_text()) for c in (ours, expected))
    assert a.keys() == b.keys()
    for epoch, evaluation in b.items():
        assert a[epoch]["accuracy"] == evaluation["accuracy"]
        assert a[epoch]["loss"] == pytest.approx(evaluation["loss"], rel=LOSS)
    a, b = ((c.run_dir / "predictions.jsonl").read_text() for c in (ours, expected))
    assert a == b and len(a.splitlines()) == 6


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_micro_batches(pair, alone, name):
    folder, (first, second) = pair(name)
    assert_same_run(config_of(folder, "two", 2), alone(name))
    said = first["seen"]["same_run"]
    assert (said["status"], said["err"]) == (0, ""), said
    assert "2 processes: an update is 2 * 1 micro-batches of 2 rows" in said["out"]
    assert second["seen"]["same_run"] == {"out": "", "err": "", "status": 0}


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.slow
def test_weights_are_the_same_bits_in_all_processes(pair, name):
    _, (first, second) = pair(name)
    assert len(first["weights"]) == {"mlx": 7, "cuda": 10}[name] and all(first["weights"])
    assert first["weights"] == second["weights"]


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.slow
def test_a_run_passed_from_one_process_to_two_and_back_equals_an_unbroken_one(pair, alone, name):
    folder, (first, _) = pair(name)
    relay = config_of(folder, "relay", 1)
    said = first["seen"]["second_leg"]["out"]
    assert f"continuing {relay.run_dir}/last: epoch 2, after 2 of its updates" in said
    if not (relay.run_dir / "epoch_03").exists():
        assert (relay.run_dir / "epoch_02").is_dir()
        start(load_twin(name), relay).train()
    assert_same_run(relay, alone(name))


HOW_FAST = re.compile("second|_memory_bytes|time|eps$|^checkpoint$|^path$|on_policy_gap")
"""Fields that tell how fast a run was, where it lies, or that are noise."""


def assert_alike(ours: Any, theirs: Any, where: str = "") -> None:
    """Equal texts, counts and answers, and numbers to float noise, but for HOW_FAST."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs.keys() - set(filter(HOW_FAST.search, theirs)):
            assert_alike(ours[key], theirs[key], f"{where} {key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_alike(a, b, f"{where} {i}")
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=RUNS, abs=RUNS), where
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("config_of_run", DATA_SETS)
@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.slow
def test_two_processes_equal_one_on_data_sets(pair, name, config_of_run):
    folder, (first, second) = pair(name)
    said = first["seen"]["runs_on_data_sets"]
    assert (said["status"], said["err"]) == (0, ""), said
    assert second["seen"]["runs_on_data_sets"] == {"out": "", "err": "", "status": 0}
    twin, config = load_twin(name), config_of_run(folder, 1)
    path = folder / f"{config.name}.yaml"
    path.write_text(config.to_yaml())
    main(twin.__name__, twin.run.make_backend, [str(path)])
    two = config_of_run(folder, 2)
    files = {p.relative_to(config.run_dir) for p in config.run_dir.rglob("*.*")}
    assert files == {p.relative_to(two.run_dir) for p in two.run_dir.rglob("*.*")}
    assert len(files) >= 4
    for file in files:
        ours, theirs = two.run_dir / file, config.run_dir / file
        if file.suffix == ".json" and file.name not in ("checksums.json", "trainer_state.json"):
            assert_alike(json.loads(ours.read_text()), json.loads(theirs.read_text()), str(file))
        elif file.suffix == ".jsonl":
            lines = ([json.loads(x) for x in p.read_text().splitlines()] for p in (ours, theirs))
            apart = ("start", "saved")  # which say their configuration, their size
            assert_alike(*([x for x in part if x.get("event") not in apart] for part in lines))
        elif file.name == "model.safetensors":
            a, b = load_file(ours), load_file(theirs)
            for weight, w in b.items():
                gap = a[weight] - w
                if weight.endswith("attn.c_attn.bias"):
                    # No softmax sees the keys' bias: its gradient is noise, which Adam blows up.
                    gap = np.delete(gap, np.s_[len(gap) // 3 : 2 * len(gap) // 3])
                # Of all entries together, since one whose gradient is near zero may go either way.
                assert np.sqrt((gap**2).mean()) < 0.03 * config.lr, weight


only_torch = pytest.mark.skipif("cuda" not in CHOSEN, reason="MLX cannot shard")


@only_torch
@pytest.mark.parametrize("act", [sharded, passed_on])
@pytest.mark.slow
def test_sharded_processes_equal_one_also_where_one_takes_over_in_between(pair, alone, act):
    folder, (first, second) = pair("cuda")
    said = first["seen"][act.__name__]
    assert (said["status"], said["err"]) == (0, ""), said
    assert second["seen"][act.__name__] == {"out": "", "err": "", "status": 0}
    config = config_of(folder, {sharded: "sharded", passed_on: "passed"}[act], 2)
    assert_same_run(config, alone("cuda"))
    files, expected = (
        {p.name for p in (c.run_dir / "epoch_03").iterdir()} for c in (config, alone("cuda"))
    )
    assert files == expected
    if act is passed_on:
        for found in ("epoch_02: epoch 3, after 0", "last: epoch 3, after 1"):
            assert f"continuing {config.run_dir}/{found} of its updates" in said["out"]


@only_torch
@pytest.mark.slow
def test_a_sharded_process_holds_half_of_weights_gradients_and_moments(pair):
    folder, _ = pair("cuda")
    first, second = (json.loads((folder / f"shares_{i}.json").read_text()) for i in (0, 1))
    weights = load_file(folder / "runs" / "sharded" / "epoch_03" / "model.safetensors")
    whole = sum(w.size for w in weights.values())
    for a, b in zip(first, second, strict=True):
        assert a.keys() == {"weights", "gradients", "exp_avg", "exp_avg_sq"}
        for kind, n in a.items():
            assert n + b[kind] == whole
            assert n == pytest.approx(whole / 2, rel=0.01)


@pytest.mark.parametrize("name", CHOSEN)
def test_sharding_is_refused_where_it_cannot_be(tmp_path, capsys, name):
    config = config_of(tmp_path, "alone", 1, shard=True)
    (tmp_path / "alone.yaml").write_text(config.to_yaml())
    twin = load_twin(name)
    with pytest.raises(SystemExit) as end:
        main(twin.__name__, twin.run.make_backend, [str(tmp_path / "alone.yaml")])
    message = {"mlx": "MLX has no sharding", "cuda": "one process has nobody to share with"}[name]
    assert end.value.code == 2
    assert f"alone.yaml: shard: {message}" in capsys.readouterr().err
    assert not config.run_dir.exists()


def test_a_run_on_a_data_set_is_not_sharded(twin, tmp_path, capsys):
    made = data_set_config(tmp_path, method="sft", name="sft")
    (tmp_path / "sft.yaml").write_text(made.to_yaml().replace("shard: false", "shard: true"))
    with pytest.raises(SystemExit) as end:
        main(twin.__name__, twin.run.make_backend, [str(tmp_path / "sft.yaml")])
    assert end.value.code == 2
    assert "shard: sft does not read it; remove it" in capsys.readouterr().err


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.slow
def test_missing_training_data_are_made_once_for_all(pair, name):
    folder, (first, second) = pair(name)
    assert first["seen"]["made_data"]["status"] == second["seen"]["made_data"]["status"] == 0
    assert len(json.loads((folder / "made.json").read_text())) == 4
    assert len(read_log(config_of(folder, "made", 2), "train")) == 1


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (error_in_one, r"process 1 of 2, on \S+: .*val.json: item 3: no question"),
        (taken_by_another, r"process 0 of 2, .*taken: is written by process PID on"),
        (disk_refuses_the_first, r"process 0 of 2, on .*cannot be written: No space left"),
        (diverged, r"loss \S+ at epoch 2, step \d, items \["),
        (error_in_the_configuration, r"wrong.yaml: \d problems\n  c_thougt: unknown key"),
        (another_batch_inside_an_epoch, r"updates of 2 rows, now an update has 8"),
        (latro_with_another_batch, r"updates of 8 rows, now an update has 4"),
        pytest.param(
            disk_refuses_the_first_of_sharded, r"process 0 of 2, .*No space left", marks=only_torch
        ),
    ],
)
@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.slow
def test_an_error_ends_all_processes_and_is_said_once(pair, name, act, message):
    if act in SHARDED and name != "cuda":
        pytest.skip("MLX cannot shard")
    folder, processes = pair(name)
    first, second = (p["seen"][act.__name__] for p in processes)
    assert first["status"] == second["status"] == 2
    assert second["err"] == ""
    lines = first["err"].splitlines()
    # The pid of this process, which holds the lock: not among a case's values, as it differs
    # between the workers that collect them.
    assert re.search(message.replace("PID", str(os.getpid())), first["err"]), first["err"]
    assert act is error_in_the_configuration or len(lines) == 1, first["err"]
    hidden = [p for p in (folder / "runs").rglob(".*") if "partial" in p.name]
    assert hidden == []


def test_every_process_makes_a_rule_s_inverses_anew_after_a_checkpoint(twin, tmp_path):
    config = config_of(tmp_path, "rule", 1, feedback="suppressed:space=vocab,refresh=9")
    runner = start(twin, config)
    runner.console.close()
    backend = runner.backend
    inverses = backend.model.feedback.inverses
    first = inverses.of(backend.model, training=True)
    assert inverses.of(backend.model, training=True) is first
    backend.save(None, with_optimizer=True)  # what all processes but the first do
    assert inverses.of(backend.model, training=True) is not first


class Told(World):
    """One of two processes; what the other says is given."""

    size = 2

    def __init__(self, rank: int, *others: bytes):
        self.rank, self.others = rank, list(others)

    def gather(self, own: bytes) -> list[bytes]:
        other = self.others.pop(0)
        return [own, other] if self.rank == 0 else [other, own]


def test_different_files_on_two_machines_are_refused_by_both(tmp_path):
    (tmp_path / "data.json").write_text("[]")
    other = json.dumps({"value": ["another digest", "mac2"], "host": "mac2"}).encode()
    for rank in (0, 1):
        with pytest.raises(AgreedError, match=r"data.json: process 1 \(on .*\) has another one"):
            Told(rank, other).check_same_file(tmp_path / "data.json")


def test_work_that_is_dealt_out_comes_back_in_its_order():
    first = Told(0, json.dumps({"value": [3], "host": "mac2"}).encode())
    n_done: list[int] = []
    assert first.deal([[1], [1, 2], [4]], sum, n_done.append) == [1, 3, 4]
    assert n_done == [3, 1]
    second = Told(1, json.dumps({"value": [1, 4], "host": "mac1"}).encode())
    assert second.deal([[1], [1, 2], [4]], sum) == [1, 3, 4]


def test_an_error_of_another_process_is_raised_at_the_next_exchange():
    other = {"where": "a.json", "problems": ["item 1: empty", "item 2: empty"], "host": "mac2"}
    with pytest.raises(AgreedError) as error:
        Told(0, json.dumps(other).encode()).exchange([1, 2])
    assert str(error.value).startswith("process 1 of 2, on mac2: a.json: 2 problems\n  item 1")


def test_a_launcher_of_the_other_twin_is_refused(twin, monkeypatch):
    is_mlx = twin.__name__ == "mlx_coconut"
    monkeypatch.setenv(*(("WORLD_SIZE", "2") if is_mlx else ("MLX_RANK", "0")))
    with pytest.raises(UserError, match="mlx.launch" if is_mlx else "torchrun"):
        twin.run.make_world()


if __name__ == "__main__":
    child(sys.argv[1], Path(sys.argv[2]))
