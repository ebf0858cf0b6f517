"""Adapters from one program to another: ours to peft's layout, peft's and mlx_lm's to ours.

mlx-coconut convert --adapter runs/my-lora/epoch_03 my-lora-peft
mlx-coconut convert --adapter my-lora-peft my-lora --base MODEL

Our own layout is mlx_lm's already: `mlx_lm.load(base, adapter_path=DIR)` opens it as it is.
"""

import importlib
import math
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from coconut.checkpoints.adapter_files import (
    adapter_config,
    check_arrays,
    fingerprint,
    from_mlx_lm,
    mlx_name,
    own_name,
    read_adapter,
)
from coconut.checkpoints.adapters import (
    ADAPTER_CONFIG,
    TRAINED,
    Adapter,
    adapted_layers,
    blocks,
    linear_layers,
    n_layers,
    vocabulary,
)
from coconut.checkpoints.checkpoint import (
    ADAPTERS,
    COCONUT,
    CONFIG,
    FEEDBACK,
    describe,
    write_atomically,
)
from coconut.checkpoints.named import checkpoint_config
from coconut.checkpoints.source import open_source
from coconut.config.lora_keys import Lora
from coconut.convert.tensors import read_file
from coconut.convert.write import refuse_existing
from coconut.errors import UserError
from coconut.files import library_writes, read_json, write_json
from coconut.text.opening import load_tokenizer

PEFT_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before every name."""
BODY = {"gpt2": "transformer.", "qwen2": "model."}
"""What the causal model of transformers puts before all modules but its head, where we do not."""
LEAVES = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "m"}
ROWS = "token_adapter.trainable_tokens_delta"
"""peft's name of trained rows: the rows themselves, not their change."""
UNKNOWN = ("rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "layer_replication")
"""Settings of peft that change the mathematics in a way that we have not."""


def convert_adapter(source: Path, target: Path, base: str | None) -> None:
    """Ours to peft's layout, peft's and mlx_lm's to ours; says which. Raises UserError."""
    refuse_existing(target)
    settings = read_json(source / ADAPTER_CONFIG)
    if "coconut" in settings:
        bits = to_peft(source, target)
        print(f"wrote {target}: peft's layout")
        if bits:
            print(
                f"note: trained beside {bits}-bit weights; peft's layout cannot say so, and on"
                " the base in full precision answers may differ a little"
            )
    else:
        to_ours(source, target, settings, base)
        print(f"wrote {target}: a checkpoint of ours, which mlx_lm opens too")


def to_peft(source: Path, target: Path) -> int | None:
    """A checkpoint of ours -> what `peft.PeftModel.from_pretrained(base, DST)` opens.

    Returns the bits of the base's weights in training; None: they were not quantised.
    """
    adapter, config = read_adapter(source), describe(source)["config"]
    arrays = from_mlx_lm(adapter, config, _read(source / ADAPTERS)) | _read(source / TRAINED)
    check_arrays({n: w.shape for n, w in arrays.items()}, config, adapter)
    lora, body = adapter.lora, BODY.get(config["model_type"], "")
    tensors = {_peft_name(name, body): _turned(name, w) for name, w in arrays.items()}
    with write_atomically(target) as partial:
        write_json(
            partial / ADAPTER_CONFIG,
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": adapter.base,
                "revision": adapter.revision,
                "inference_mode": True,
                "r": lora.rank,
                "lora_alpha": lora.scale * lora.rank,
                "lora_dropout": lora.dropout,
                "use_dora": lora.type == "dora",
                "bias": "none",
                "fan_in_fan_out": config["model_type"] == "gpt2",
                "target_modules": [body + path for path in adapted_layers(config, lora)],
                "trainable_token_indices": {p: list(adapter.rows) for p in vocabulary(config)}
                if adapter.rows
                else None,
            },
        )
        with library_writes(partial / PEFT_WEIGHTS, SafetensorError):
            save_file(tensors, partial / PEFT_WEIGHTS, metadata={"format": "pt"})
        load_tokenizer(source).save(partial)
        for name in (COCONUT, FEEDBACK):
            if (source / name).exists():
                shutil.copy(source / name, partial / name)
    return lora.quantize or (config.get("quantization") or {}).get("bits")


def to_ours(source: Path, target: Path, settings: dict[str, Any], given: str | None) -> None:
    """peft's or mlx_lm's adapter -> a checkpoint that every program here opens."""
    is_peft = "peft_type" in settings
    name = given or settings.get("base_model_name_or_path" if is_peft else "model")
    if not name or not Path(name).is_dir():
        raise UserError(str(source), f"its base {name} is no directory here; name it with --base")
    base = Path(name).resolve()
    config = describe(base)["config"]
    body = BODY.get(config["model_type"], "")
    if is_peft:
        arrays = _from_peft(_read(source / PEFT_WEIGHTS), body)
        lora, rows = _peft_settings(settings, str(source)), _peft_rows(settings, config)
    else:
        arrays = _read(source / ADAPTERS)
        arrays = {own_name(config, n): w for n, w in arrays.items()}
        lora, rows = _mlx_lm_settings(settings, str(source)), ()
    lora = Lora(**{**vars(lora), **_places(arrays, config, str(source))})
    new = range(config["vocab_size"], max((*rows, -1)) + 1)
    adapter = Adapter(lora, rows, str(base), fingerprint(base), new, source)
    check_arrays({n: w.shape for n, w in arrays.items()}, config, adapter)
    whole = {n: w for n, w in arrays.items() if n.endswith(".rows")}
    factors = {mlx_name(n): w for n, w in arrays.items() if n not in whole}
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder)
        with library_writes(staged, SafetensorError):
            save_file(factors, staged / ADAPTERS)
            save_file(whole, staged / TRAINED)
        write_json(staged / ADAPTER_CONFIG, adapter_config(adapter, config))
        n_rows = max(config["vocab_size"], new.stop)
        write_json(staged / CONFIG, config | {"vocab_size": n_rows})
        with_tokenizer = source if (source / "tokenizer_config.json").exists() else base
        load_tokenizer(with_tokenizer).save(staged)
        for extra in (COCONUT, FEEDBACK):
            if (source / extra).exists():
                shutil.copy(source / extra, staged / extra)
        # Opened and saved by a twin: what is written has been read once.
        run_config = checkpoint_config(staged)
        opened = open_source(run_config)
        backend = _twin().make_backend(run_config, opened.source)
        with write_atomically(target) as partial:
            backend.save(partial, with_optimizer=False)
            opened.tokenizer.save(partial)
            if (staged / COCONUT).exists():
                shutil.copy(staged / COCONUT, partial / COCONUT)


def _twin() -> Any:
    for package in ("mlx_coconut", "cuda_coconut"):
        try:
            importlib.import_module(f"{package}.backend")
        except ImportError:
            continue
        return importlib.import_module(f"{package}.run")
    raise UserError("convert", "neither mlx nor torch is installed; one of them must be")


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        raise UserError(str(path), "missing")
    tensors, _, _ = read_file(path)
    return {name: tensor.float32() for name, tensor in tensors.items()}


def _turned(name: str, w: np.ndarray) -> np.ndarray:
    is_factor = name.endswith((".lora_a", ".lora_b"))
    return np.ascontiguousarray(w.T if is_factor else w)


def _peft_name(name: str, body: str) -> str:
    path, leaf = name.rsplit(".", 1)
    theirs = {ours: theirs for theirs, ours in LEAVES.items()} | {"rows": ROWS}
    return PREFIX + ("" if path == "lm_head" else body) + f"{path}.{theirs[leaf]}"


def _from_peft(tensors: Mapping[str, np.ndarray], body: str) -> dict[str, np.ndarray]:
    out = {}
    for name, w in tensors.items():
        for theirs, ours in {**LEAVES, ROWS: "rows"}.items():
            if name.endswith(f".{theirs}"):
                path = name.removesuffix(theirs).removeprefix(PREFIX).removeprefix(body)
                out[path + ours] = _turned(path + ours, w)
                break
        else:
            raise UserError(PEFT_WEIGHTS, f"{name}: not an adapter's array that we know")
    return out


def _peft_settings(settings: Mapping[str, Any], where: str) -> Lora:
    problems = [f"{n}: not supported here" for n in UNKNOWN if settings.get(n)]
    if settings["peft_type"] != "LORA":
        problems.append(f"peft_type: expected LORA, got {settings['peft_type']}")
    if settings.get("bias", "none") != "none":
        problems.append("bias: trained biases are not supported here")
    if problems:
        raise UserError(where, *problems)
    rank = int(settings["r"])
    scale = settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    kind = "dora" if settings.get("use_dora") else "lora"
    return Lora(kind, rank, scale, dropout=settings.get("lora_dropout", 0.0))


def _peft_rows(settings: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[int, ...]:
    indices = settings.get("trainable_token_indices") or {}
    if isinstance(indices, list):
        return tuple(indices)
    found = {tuple(tokens) for tokens in indices.values()}
    if len(found) > 1 or set(indices) - set(vocabulary(config)):
        raise UserError(
            ADAPTER_CONFIG, "trainable_token_indices: embedding and head must train the same rows"
        )
    return found.pop() if found else ()


def _mlx_lm_settings(settings: Mapping[str, Any], where: str) -> Lora:
    kind, values = settings.get("fine_tune_type", "lora"), settings.get("lora_parameters") or {}
    if kind not in ("lora", "dora") or "scale" not in values:
        raise UserError(where, "neither peft's adapter nor one of mlx_lm's lora or dora")
    return Lora(kind, values["rank"], values["scale"], dropout=values.get("dropout", 0.0))


def _places(
    arrays: Mapping[str, np.ndarray], config: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """targets and layers, read off the names: all that settings may say differently."""
    pattern = re.compile(rf"{re.escape(blocks(config))}\.(\d+)\.(.+)\.lora_a")
    found: dict[int, set[str]] = {}
    for name in arrays:
        if match := pattern.fullmatch(name):
            found.setdefault(int(match[1]), set()).add(match[2])
    total = n_layers(config)
    kinds = {frozenset(paths) for paths in found.values()}
    if len(kinds) != 1 or sorted(found) != list(range(total - len(found), total)):
        raise UserError(where, "its layers are not the same ones of the last blocks; fuse it there")
    paths = kinds.pop()
    known = list(linear_layers(config))
    targets = ["all"] if paths == set(known) else [path for path in known if path in paths]
    return {"targets": targets, "layers": None if len(found) == total else len(found)}
