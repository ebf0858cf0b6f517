"""Tiny models and runs for tests: copies of a golden model, one training step, one whole run."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from chat_tokenizers import TEMPLATES, chat_tokenizer
from golden_models import MODELS, as_row
from safetensors.numpy import load_file, save_file

from coconut.batches.batch import Batch
from coconut.batches.curriculum import Row
from coconut.checkpoints.initial import initial_weights
from coconut.checkpoints.verdict import args_of
from coconut.config.keys import RunConfig
from coconut.config.reading import check_config
from coconut.run.curriculum_loop import Runner
from coconut.tasks import prosqa, prosqa_graph

MODEL = MODELS / "gpt2-tiny"
REPOSITORY = Path(__file__).parent.parent


def model_directory(path: Path, **changes: Any) -> Path:
    """The golden GPT-2 in a directory of its own, with changes to its config.json."""
    path.mkdir()
    config = json.loads((MODEL / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").symlink_to(MODEL / "model.safetensors")
    return path


def zero_model(directory: Path, **config: Any) -> Path:
    """A hand-written architecture's directory, as small as it gets unless told; all weights 0."""
    if config.setdefault("model_type", "gpt2") == "gpt2":
        config = {
            "vocab_size": 9,
            "n_positions": 8,
            "n_embd": 2,
            "n_layer": 1,
            "n_head": 1,
        } | config
    else:
        sizes = ("vocab_size", "hidden_size", "intermediate_size")
        counts = ("num_hidden_layers", "num_attention_heads")
        config = dict.fromkeys(sizes, 8) | dict.fromkeys(counts, 1) | config
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    shapes = args_of(config).shapes()
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(zeros, directory / "model.safetensors")
    return directory


def dropout(**rates: float) -> dict[str, float]:
    """The rates of a config.json, 0 unless given."""
    return {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0} | rates


def dropout_key(twin: ModuleType, number: int) -> Any:
    """What a twin's `latent_forward` takes to turn dropout on."""
    if twin.__name__ == "cuda_coconut":
        return (number,)
    import mlx.core as mx

    return mx.random.key(number)


def rows_of(batch: Batch) -> list[Row]:
    """The rows of a collated batch, unpadded."""
    rows = []
    for i, real in enumerate(batch.mask):
        ids, labels = batch.ids[i][real].tolist(), batch.labels[i][real].tolist()
        rows.append(as_row(int(batch.idx[i]), ids, labels))
    return rows


def gradients(
    twin: ModuleType,
    directory: Path,
    micro_batches: list[Batch],
    scratch: Path,
    key: tuple[int, ...] = (0,),
    **options: Any,
) -> tuple[Any, dict[str, np.ndarray]]:
    """(StepStats, gradients by Hugging Face name) of a training step.

    Read from AdamW's first moment, which a first step leaves at a tenth of the gradient: so it is
    what the optimizer was given, divided by the targets and clipped.
    """
    model, module, _ = twin.weights.load_model(directory)
    trainer = twin.train.Trainer(model, weight_decay=0.0, **options)
    stats = trainer.step(micro_batches, 0.0, key)
    twin.weights.save_moments(trainer.optimizer, module, scratch)
    moments = load_file(scratch / "optimizer.safetensors")
    return stats, {n[2:]: m * np.float32(10) for n, m in moments.items() if n.startswith("m.")}


def assert_same_gradients(
    ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], tolerance: float
) -> None:
    """Every tensor's gap is below `tolerance` of its norm."""
    assert ours.keys() == theirs.keys()
    for name, g in theirs.items():
        assert np.linalg.norm(ours[name] - g) < tolerance * gradient_scale(theirs, name), name


# What an update of Adam may differ by, in steps of the learning rate, largest and mean of a tensor.
# It divides each gradient by its own size: where that is nearly all rounding (1e-7 of what was
# summed), an entry moves by a visible part of a step, on another machine by another. Lost moments
# or another rate move most entries by half a step. Seen: 1.2e-4 and 7.5e-6.
LARGEST_STEP, MEAN_STEP = 0.1, 1e-3


def assert_same_updates(
    ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], lr: float
) -> None:
    """Weights that Adam left after the same updates at a rate."""
    assert ours.keys() == theirs.keys()
    for name, w in theirs.items():
        gap = np.abs(ours[name].astype(np.float64) - w) / lr
        assert gap.max() < LARGEST_STEP and gap.mean() < MEAN_STEP, name


def gradient_scale(grads: dict[str, np.ndarray], name: str) -> float:
    """Norm of a gradient; for one that is all rounding (the key bias) that of its neighbours."""
    floor = 1e-3 * max(float(np.linalg.norm(g)) for g in grads.values())
    return max(float(np.linalg.norm(grads[name])), floor)


def write_items(path: Path, n: int, seed: int = 7) -> Path:
    """A data file of n small ProsQA items."""
    items = list(
        prosqa.generate(prosqa_graph.Options(nodes=16, max_hops=4), seed, n, 0, frozenset())
    )
    path.write_text(json.dumps(items))
    return path


def run_config(folder: Path, **keys: Any) -> RunConfig:
    """A run of a tiny random GPT-2 on 8 items, validated on 4: one update an epoch, two epochs."""
    train, val = folder / "train.json", folder / "val.json"
    if not train.exists():
        write_items(train, 8)
    if not val.exists():
        write_items(val, 4, seed=8)
    values = {
        "save_path": str(folder / "runs"),
        "name": "tiny",
        "model_config_path": str(REPOSITORY / "args/models/tiny_gpt2.json"),
        "tokenizer": "prosqa",
        "train_path": str(train),
        "val_path": str(val),
        "max_latent_stage": 1,
        "epochs_per_stage": 1,
        "num_epochs": 2,
        "batch_size_training": 8,
        "pad_multiple": 64,
        "lr": 1e-3,
        "max_new_tokens": 4,
        "report": False,
    }
    if "method" not in keys:
        values["method"] = "coconut"
    return check_config(values | keys)


def start(twin: ModuleType, config: RunConfig) -> Runner:
    """A Runner of a twin, as its command makes it."""
    return Runner(config, twin.run.make_backend, twin.__name__)


TIMES = ("time", "tokens_per_second", "eta_seconds")


def read_log(config: RunConfig, event: str) -> list[dict[str, Any]]:
    """The events of one kind in a run's log.jsonl, without their time."""
    lines = (config.run_dir / "log.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in record.items() if k not in TIMES}
        for record in map(json.loads, lines)
        if record["event"] == event
    ]


def random_gpt2(
    directory: Path,
    vocab: int,
    width: int,
    n_layer: int = 1,
    n_positions: int = 8,
    std: float = 0.2,
) -> Path:
    """A GPT-2 with two heads and normal weights of this spread, the same at every call."""
    D = width
    directory.mkdir(parents=True, exist_ok=True)
    config = json.loads((MODEL / "config.json").read_text())
    config |= {"vocab_size": vocab, "n_layer": n_layer, "n_positions": n_positions}
    config |= {"n_embd": D, "n_head": 2, "initializer_range": std}
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (vocab, D), "wpe.weight": (n_positions, D)}
    for h in (f"h.{i}" for i in range(n_layer)):
        for name, n, m in (
            ("attn.c_attn", D, 3 * D),
            ("attn.c_proj", D, D),
            ("mlp.c_fc", D, 4 * D),
            ("mlp.c_proj", 4 * D, D),
        ):
            shapes |= {f"{h}.{name}.weight": (n, m), f"{h}.{name}.bias": (m,)}
        shapes |= {f"{h}.{n}.{k}": (D,) for n in ("ln_1", "ln_2") for k in ("weight", "bias")}
    shapes |= {"ln_f.weight": (D,), "ln_f.bias": (D,)}
    save_file(initial_weights(shapes, config, 0), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def chat_model(directory: Path, template: str | None = "chatml", n_positions: int = 512) -> Path:
    """A random GPT-2 of one layer, with a tokenizer of bytes and control tokens beside it.

    template: of TEMPLATES, or None. Its weights are so large that its outputs differ by question.
    """
    tokenizer = chat_tokenizer(directory, template and TEMPLATES[template], eos="<|im_end|>")
    return random_gpt2(directory, len(tokenizer), 16, n_positions=n_positions, std=0.6)


def data_set_config(folder: Path, **keys: Any) -> RunConfig:
    """A run over the first lines of the files of `chains`, of a random model beside them."""
    model = folder / "model"
    if not model.exists():
        chat_model(model)
    for part, n in (("train", 24), ("test", 6)):
        lines = (REPOSITORY / f"data/chains_{part}.jsonl").read_text().splitlines()[:n]
        (folder / f"{part}.jsonl").write_text("".join(line + "\n" for line in lines))
    values = {
        "save_path": str(folder / "runs"),
        "model_id": str(model),
        "dataset_name": "chains",
        "train_path": str(folder / "train.jsonl"),
        "test_path": str(folder / "test.jsonl"),
        "validation_items": 6,
    }
    if keys.get("method") != "preexperiment":
        values["response_length"] = 6
    return check_config(values | keys)
