"""Mutated inputs, given to the commands as a user would: each ends well, or in a line and status 2.

    python tests/fuzz.py 10000 [--kind data ...] [--seed 0] [--into RESULTS.md]
    python tests/fuzz.py --kind data --only 17 --keep DIR      # one input again, its files in DIR

An input is drawn from (seed, kind, number) alone. It fails if it ends in an exception or another
status, or without a message; if it takes more than 10 s, or 500 MB beyond what its process held.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import random
import re
import resource
import runpy
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["MLX_DISABLE_COMPILE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import yaml  # noqa: E402
from tables import replace_table, table  # noqa: E402

SECONDS, MEGABYTES = 10.0, 500
TWINS = ("mlx_coconut", "cuda_coconut")

# ---- mutations

ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.0, 2**31, -(2**63), 2**64, 10**30, 1e-320),
    *(1e308, float("nan"), float("inf"), "", " ", "\n", "\0", "\ud800", "é" * 40, "a" * 5_000),
    *("1", "1e-4", "nan", "null", "true", "../..", "/dev/null", "<|latent|>", "<|end-latent|>"),
    *("####", "{{", "%", "\\", "\u202e", "last", "gpt2", [], {}, [[]], [None], [1, 2], ["a"]),
    *({"a": 1}, {"": None}, {"__class__": 1}, [[[[[[[[1]]]]]]]], list(range(300)), [["a", 1]] * 3),
]


def a_path(rng: random.Random, value: Any) -> tuple:
    """Where a part of a JSON value lies; small branches are as likely as large ones."""
    at: tuple = ()
    while isinstance(value, (dict, list)) and value and rng.random() < (0.8 if at else 0.98):
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        at, value = (*at, key), value[key]
    return at


def alike(rng: random.Random, value: Any) -> Any:
    """Something odd, half of the time of the same kind."""
    same = [part for part in ODD if type(part) is type(value)]
    return rng.choice(same if same and rng.random() < 0.5 else ODD)


def mutated_tree(rng: random.Random, value: Any, most: int = 2) -> Any:
    """A JSON value with one to `most` parts replaced, deleted, doubled, moved or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, most)):
        *at, last = a_path(rng, value) or (None,)
        if last is None:
            if rng.random() < 0.1:
                return rng.choice(ODD)
            continue
        holder = value
        for key in at:
            holder = holder[key]
        how = rng.randrange(8)
        if how < 4:
            holder[last] = alike(rng, holder[last])
        elif how == 4:
            del holder[last]
        elif how == 5:
            holder[last] = [holder[last]] if rng.random() < 0.5 else {"x": holder[last]}
        elif how == 6 and isinstance(holder, dict):
            holder[mutated_text(rng, str(last))] = holder.pop(last)
        elif how == 6:
            holder.insert(last, holder[rng.randrange(len(holder))])
        elif isinstance(holder[last], str):
            holder[last] = mutated_text(rng, holder[last])
        elif isinstance(holder[last], (int, float)):
            holder[last] = holder[last] * rng.choice([-1, 0, 2, 0.5, 1000]) + rng.choice([0, 1])
        else:
            other = value
            for key in a_path(rng, value):
                other = other[key]
            holder[last] = json.loads(json.dumps(other))
    return value


def mutated_text(rng: random.Random, text: str, words: tuple[str, ...] = ()) -> str:
    """A text with a piece deleted, doubled, moved, or words put in."""
    odd = [*(part for part in ODD if isinstance(part, str)), *words * 3]
    for _ in range(rng.randint(1, 3)):
        i, j = sorted(rng.randint(0, len(text)) for _ in range(2))
        j = min(j, i + rng.choice([1, 3, 20, 200]))
        piece = rng.choice(["", text[i:j] * 2, rng.choice(odd), chr(rng.choice(CHARACTERS))])
        text = text[:i] + piece + text[j:]
    return text


CHARACTERS = [*range(32, 127), 0, 9, 10, 13, 0xE9, 0x2212, 0x3000, 0xFEFF, 0x1F600]


def mutated_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bytes cut, flipped, deleted, doubled or overwritten."""
    made = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        i = rng.randint(0, len(made))
        j = min(len(made), i + rng.choice([1, 1, 4, 64]))
        how = rng.randrange(5)
        if how == 0:
            del made[i:]
        elif how == 1 and i < len(made):
            made[i] ^= 1 << rng.randrange(8)
        elif how == 2:
            del made[i:j]
        elif how == 3:
            made[i:j] = rng.randbytes(j - i)
        else:
            made[i:i] = made[i:j] * rng.choice([1, 1, 50])
    return bytes(made)


def to_text(value: Any) -> str:
    """JSON, lone surrogates and NaN included."""
    return json.dumps(value)


def damage(rng: random.Random, path: Path) -> None:
    """Mutate one file in its own form, or delete it."""
    content = path.read_bytes()
    how = rng.random()
    if how < 0.08:
        path.unlink()
        if rng.random() < 0.3:
            path.mkdir()
    elif how < 0.18:
        path.write_bytes(mutated_bytes(rng, content))
    elif path.suffix == ".json":
        path.write_text(to_text(mutated_tree(rng, json.loads(content))))
    elif path.suffix == ".jsonl":
        lines = content.decode().splitlines()
        i = rng.randrange(len(lines))
        lines[i] = to_text(mutated_tree(rng, json.loads(lines[i])))
        path.write_text("\n".join(lines))
    elif path.name == "checkpoint_1":
        torch_file(rng, path)
    elif path.suffix == ".safetensors" and how < 0.6:
        odd_tensors(rng, path)
    elif path.suffix == ".safetensors":
        size = int.from_bytes(content[:8], "little")
        header = to_text(mutated_tree(rng, json.loads(content[8 : 8 + size]))).encode()
        tail = (
            content[8 + size :] if rng.random() < 0.8 else mutated_bytes(rng, content[8 + size :])
        )
        path.write_bytes(len(header).to_bytes(8, "little") + header + tail)
    elif path.suffix in (".yaml", ".jinja", ".txt", ".tiktoken"):
        path.write_bytes(mutated_text(rng, content.decode()).encode("utf-8", "surrogatepass"))
    else:
        path.write_bytes(mutated_bytes(rng, content))


def damage_some(rng: random.Random, folder: Path) -> None:
    """Mutate one to three of the files of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in rng.sample(files, min(len(files), rng.choice([1, 1, 2, 3]))):
        damage(rng, path)


def odd_tensors(rng: random.Random, path: Path) -> None:
    """A sound safetensors file whose tensors are not what they should be."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    for name in rng.sample(sorted(tensors), min(len(tensors), rng.choice([1, 1, 3]))):
        part = tensors.pop(name)
        how = rng.randrange(9)
        if how == 0:
            continue
        if how == 1:
            part = part * np.float32(rng.choice([np.nan, np.inf, 1e38, 0, -1]))
        elif how == 2:
            part = part.astype(rng.choice([np.float64, np.float16, np.int8, np.bool_, np.uint64]))
        elif how == 3:
            part = np.ascontiguousarray(rng.choice([part[None], part[:1], part[:0], part.T]))
        elif how == 4:
            part = part.reshape(-1)
        elif how == 5:
            part = part.flat[:1].reshape((1,) * rng.choice([0, 3, 64])) if part.size else part
        elif how == 6:
            tensors["model." + name] = part
        elif how == 7:
            name = mutated_text(rng, name).encode("utf-8", "replace").decode()
        else:
            tensors[name + rng.choice([".lora_A", "_scales", ".bias", ".1"])] = part[..., :1].copy()
        tensors[name] = part
    with contextlib.suppress(ValueError):  # more axes than numpy has
        save_file(tensors, path)


def torch_file(rng: random.Random, path: Path) -> None:
    """A sound torch file that holds something else than a sound state dict."""
    import torch

    state = torch.load(path, weights_only=True)
    for name in rng.sample(sorted(state), rng.choice([1, 1, 3])):
        part = state.pop(name)
        odd = [
            *(part.double(), part.to(torch.bfloat16), part.to(torch.int8), part > 0, part[None]),
            *(
                part.to(torch.complex64),
                part[:0],
                part.mT if part.ndim > 1 else part,
                part.flatten(),
                part * float("nan"),
            ),
            *(part.to_sparse(), part[:1].expand(part.shape), part.sum(), part.numpy().tolist()),
            *(torch.nn.Parameter(part), {"x": part}, [part], None, 1, "a", torch.Size([1])),
            *(part.as_strided((3, 3), (0, 0)), torch.empty(part.shape, device="meta"), part),
        ]
        name = rng.choice([name, name, name, "module." + name, mutated_text(rng, name)])
        if rng.random() < 0.9:
            state[name] = rng.choice(odd)
    if rng.random() < 0.3:
        inside = rng.choice(["state_dict", "model_state_dict", "model", "x", 1])
        state = {inside: state, "epoch": 3, "optimizer": {"a": [torch.ones(1)]}}
    try:
        torch.save(rng.choice([state, state, state, [state], list(state.values())]), path)
    except Exception:
        path.write_bytes(b"")


def reseal(folder: Path) -> None:
    """Make checksums.json fit what lies there now."""
    from coconut.checkpoints.checkpoint import _seal

    for sums in folder.rglob("checksums.json"):
        if sums.is_file():
            sums.unlink()
            _seal(sums.parent)


# ---- what is mutated

MODEL = {
    "model_type": "gpt2",
    "n_positions": 128,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "resid_pdrop": 0.1,
}
RUN = {
    "method": "coconut",
    "tokenizer": "prosqa",
    "max_latent_stage": 1,
    "epochs_per_stage": 1,
    "num_epochs": 1,
    "batch_size_training": 2,
    "max_new_tokens": 3,
    "name": "run",
    "report": False,
}
LATRO = {
    "tokenizer": "bytes",
    "validation_items": 2,
    "rloo_k": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "rollout_batch_size": 2,
    "total_updates": 1,
    "num_evaluations": 1,
    "response_length": 3,
    "evaluation_items": 2,
    "run_name": "run",
    "report": False,
}
GSM8K = [
    {"question": f"Tom has {n} apples.", "answer": f"He eats 2. <<{n}-2={n - 2}>>\n#### {n - 2}"}
    for n in (3, 4, 5, 6)
]
CHOICES = {"text": ["a fox", "a stone"], "label": ["A", "B"]}
ARC = [
    {"question": "What runs?", "choices": CHOICES, "answerKey": "A"},
    {
        "question": {
            "stem": "What lies?",
            "choices": [{"text": t, "label": x} for t, x in (("fox", "1"), ("stone", "2"))],
        },
        "answerKey": "2",
    },
]
PRONTOQA = {
    f"example{n}": {
        "test_example": {
            "question": "Every wumpus is a yumpus. Max is a wumpus.",
            "query": "True or false: Max is a yumpus.",
            "chain_of_thought": [
                "Max is a wumpus.",
                "Every wumpus is a yumpus.",
                "Max is a yumpus.",
            ],
            "answer": "True",
        }
    }
    for n in (1, 2)
}
LABELLED = {
    "question": "Tom is a fox. A fox is a bug. Is Tom a bug?",
    "answer": "bug",
    "steps": [],
    "latents": 2,
    "thoughts": ["fox", "bug"],
}


def command(twin: str, *argv: Any) -> Callable[[], None]:
    """What a user types: the verb and its arguments."""

    def call() -> None:
        import importlib

        entry = importlib.import_module(f"{twin}.run")
        entry.main([str(part) for part in argv])

    return call


def script(name: str, *argv: Any) -> Callable[[], None]:
    """`python NAME ...`, in this process."""

    def call() -> None:
        before = sys.argv[:]
        sys.argv = [name, *map(str, argv)]
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        finally:
            sys.argv = before

    return call


def prepare(folder: Path) -> None:
    """The sound inputs: a run with its checkpoints, models, tokenizers, state dicts, data."""
    import torch
    from safetensors.torch import load_file
    from tiny import chat_model, random_gpt2

    items = json.loads((ROOT / "data/prosqa_tiny.json").read_text())[:3]
    (folder / "items.json").write_text(json.dumps(items))
    (folder / "model.json").write_text(json.dumps(MODEL))
    run = RUN | {"model_config_path": str(folder / "model.json"), "save_path": str(folder / "runs")}
    run |= {"train_path": str(folder / "items.json"), "val_path": str(folder / "items.json")}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    command("cuda_coconut", "run", folder / "run.yaml", "save_every=1")()
    chat_model(folder / "chat", n_positions=256)
    chained = (ROOT / "data/chains_train.jsonl").read_text().splitlines()[:4]
    (folder / "chains.jsonl").write_text("\n".join(chained))
    (folder / "chains_test.jsonl").write_text("\n".join(reversed(chained)))
    for name, rows in (("gsm8k", GSM8K), ("arc", ARC)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "prontoqa.json").write_text(json.dumps(PRONTOQA))
    (folder / "gsm8k.txt").write_text("How many?||<<1+1=2>> <<2+1=3>> #### 3\nWhy?|| #### 4\n")
    official = folder / "official"
    official.mkdir()
    weights = load_file(folder / "runs/run/epoch_01/model.safetensors")
    named = {f"base_causallm.transformer.{name}": part for name, part in weights.items()}
    torch.save(named, official / "checkpoint_1")
    shutil.copy(folder / "runs/run/epoch_01/config.json", official / "config.json")
    random_gpt2(folder / "plain", 300, 8)


Given = tuple[random.Random, Path, Path, str]
"""An input's source, its own folder, the folder of sound inputs, a twin."""


def configuration(rng: random.Random, folder: Path, sound: Path, twin: str) -> Callable[[], None]:
    """Any run of args/, its keys or its text mutated, asked by --check."""
    source = rng.choice([*sorted((ROOT / "args").glob("*.yaml")), sound / "run.yaml"])
    text = source.read_text()
    if rng.random() < 0.75:
        given = yaml.safe_load(text)
        if isinstance(given.get("generate"), dict):
            given["generate"] |= {"items": 20, "fresh": False}
        sound_paths = {"train_path": "items.json", "val_path": "items.json"}
        sound_paths |= {"load_model_path": "runs/run/epoch_01", "model_config_path": "model.json"}
        if "dataset_name" in given:
            given["dataset_name"] = "chains"
            sound_paths = {"train_path": "chains.jsonl", "test_path": "chains_test.jsonl"}
            sound_paths |= {"model_id": "chat", "load_model_path": "chat"}
            given |= {name: str(sound / sound_paths[name]) for name in ("train_path", "test_path")}
        given |= {k: str(sound / path) for k, path in sound_paths.items() if k in given}
        if rng.random() < 0.1:
            schema = json.loads((ROOT / "args/schema.json").read_text())
            given[rng.choice(list(schema["properties"]))] = rng.choice(ODD)
        else:
            given = mutated_tree(rng, given, most=rng.choice([1, 1, 3]))
        text = to_text(given) if rng.random() < 0.7 else yaml.safe_dump(given, allow_unicode=True)
    else:
        text = mutated_text(rng, text, ("&a [*a]", "!!bool x", "? ", "- ", "<<: ", "generate: "))
    path = folder / "run.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    keys = [f"save_path={folder / 'runs'}"]
    if rng.random() < 0.3:
        keys.append(mutated_text(rng, rng.choice(["lr=1e-4", "generate.items=5", "lora.rank=2"])))
    return command(twin, "run", path, "--check", *(key for key in keys if key[:1] != "-"))


def data(rng: random.Random, folder: Path, sound: Path, twin: str) -> Callable[[], None]:
    """Items of a curriculum, trained on for an epoch and evaluated."""
    items = json.loads((sound / "items.json").read_text())
    keys = {"save_path": str(folder / "runs"), "method": "coconut"}
    if rng.random() < 0.3:
        items = [LABELLED] * 3
        keys |= {"method": "coconut_no_curriculum"}
    elif rng.random() < 0.4:
        items = [item | {"steps": item["steps"] * 3} for item in items]
        keys["method"] = rng.choice(["pause", "icot", "recall", "cot", "no_cot", "no_thoughts"])
    if rng.random() < 0.85:
        content = to_text(mutated_tree(rng, items, most=rng.choice([1, 1, 3]))).encode()
    else:
        content = mutated_bytes(rng, to_text(items).encode())
    path = folder / "items.json"
    path.write_bytes(content)
    which = rng.choice(["train_path", "val_path"])
    run = yaml.safe_load((sound / "run.yaml").read_text()) | keys | {which: str(path)}
    if keys["method"] in ("icot", "coconut_no_curriculum", "cot", "no_cot", "no_thoughts"):
        del run["epochs_per_stage"]
    if keys["method"] in ("cot", "no_cot", "no_thoughts"):
        del run["max_latent_stage"]
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return command(twin, "run", folder / "run.yaml")


def latro_data(rng: random.Random, folder: Path, sound: Path, twin: str) -> Callable[[], None]:
    """Items of a data set, for an update of LaTRO or an epoch of SFT."""
    name, data_set = rng.choice(
        [("chains", "chains"), ("gsm8k", "gsm8k"), ("arc", "arc_challenge")]
    )
    if name == "arc":
        items = [
            {
                "question": f"What runs {n}?",
                "options": ["fox", "stone"],
                "answer": "fox",
                "label": "A",
            }
            for n in range(4)
        ]
        (folder / "data.json").write_text(json.dumps(items))
        (folder / "other.json").write_text(json.dumps(items[::-1]))
        path, other = folder / "data.json", folder / "other.json"
    else:
        path = Path(shutil.copy(sound / f"{name}.jsonl", folder / "data.jsonl"))
        other = sound / f"{name}.jsonl"
    damage(rng, path)
    paths = [str(path), str(other)]
    rng.shuffle(paths)
    run = {"dataset_name": data_set, "train_path": paths[0], "test_path": paths[1]}
    run |= {"save_path": str(folder / "runs"), "model_id": str(sound / "chat")}
    if rng.random() < 0.6:
        run |= LATRO | {"method": "latro"}
        del run["tokenizer"]
    else:
        run |= {"method": "sft", "num_epochs": 1, "response_length": 3, "validation_items": 2}
        run |= {"batch_size_training": 2, "name": "run", "report": False}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return command(twin, "run", folder / "run.yaml")


def tokenizers(rng: random.Random, folder: Path, sound: Path, twin: str) -> Callable[[], None]:
    """A model with a damaged tokenizer, asked a question."""
    source = sound / rng.choice(["chat", "runs/run/epoch_01"])
    model = Path(shutil.copytree(source, folder / "model"))
    names = ("tokenizer.json", "tokenizer_config.json", "encoding.json", "encoding.tiktoken")
    files = [model / name for name in names if (model / name).exists()]
    for path in rng.sample(files, rng.choice([1, 1, 2])):
        damage(rng, path)
    if rng.random() < 0.9:
        reseal(model)
    asked = ["--prompt", rng.choice(["Tom is ü 5.", "a" * 100]), "--max-new-tokens", 2]
    return command(twin, "generate", "--model", model, *asked)


def checkpoints(rng: random.Random, folder: Path, sound: Path, twin: str) -> Callable[[], None]:
    """A damaged run that goes on, is evaluated, asked, looked into or copied."""
    shutil.copytree(sound / "runs", folder / "runs")
    damage_some(rng, folder / "runs/run" / rng.choice(["epoch_01", "epoch_01", "."]))
    if rng.random() < 0.85:
        reseal(folder / "runs/run")
    model = folder / "runs/run/epoch_01"
    keys = [f"save_path={folder / 'runs'}"]
    how = rng.randrange(6)
    if how < 2:
        return command(twin, "run", sound / "run.yaml", *keys, "num_epochs=2")
    if how == 2:
        keys += ["only_eval=True", f"load_model_path={model}", "name=eval"]
        return command(twin, "run", sound / "run.yaml", *keys)
    if how == 3:
        asked = ["--prompt", "Tom is a fox.", "--max-new-tokens", 2, "--json"]
        return command(twin, "generate", "--model", model, *asked)
    if how == 4:
        what = ["--data", sound / "items.json", "--idx", 1, "--json"]
        return command(twin, "inspect", "--model", model, *what)
    return command(twin, "convert", model, folder / "copy")


WORDS = (
    *("{{", "}}", "{%", "%}", " for m in messages ", "{% endfor %}", " * 10 ** 10", "range(10**9)"),
    *("messages[9]", ".__class__", "| tojson", "| trim", "{% set x = ", "{% if x %}", "loop.index"),
    *("raise_exception('no')", "namespace(n=1)", "{% macro f() %}{{ f() }}{% endmacro %}", " ~ x"),
    *("| center(99999999)", "| batch(2)", "| format", "'%c' % -1", "1/0", "strftime_now('\\0')"),
)


EXPRESSIONS = (
    *("1 / 0", "messages", "messages[9].content", "messages | tojson", "'a' * 10 ** 10", "m.x.y"),
    *(
        "range(10 ** 9) | list",
        "x ~ x ~ x",
        "messages | map(attribute='role') | join",
        "loop.index",
    ),
    *(
        "''.__class__",
        "raise_exception(messages)",
        "strftime_now('%Y' * 999)",
        "'%s' % m",
        "10 ** 9",
    ),
    *(
        "'{0.x}'.format(1)",
        "'x' | center(10 ** 9)",
        "m.content[::-1]",
        "10 ** 10 ** 8",
        "-1 ** 0.5",
    ),
    *("'\\ud800'", "messages | sort", "namespace(a=1).a", "cycler(1, 2).next()", "lipsum(99)"),
    *("m.content | replace('a', 'aa')", "[1] * 10 ** 9", "bos_token * 3", "eos_token", "0"),
)


def templates(rng: random.Random, folder: Path, sound: Path, twin: str) -> Callable[[], None]:
    """A chat template, mutated, filled for a question of LaTRO's check."""
    from chat_tokenizers import TEMPLATES

    model = Path(shutil.copytree(sound / "chat", folder / "model"))
    template = rng.choice(list(TEMPLATES.values()))
    if rng.random() < 0.5:
        for _ in range(rng.randint(1, 3)):  # an expression, or what stands between two blocks
            parts = re.split(r"(\{\{.*?\}\}|\{%.*?%\})", template)
            i = rng.randrange(len(parts))
            inner = rng.choice(EXPRESSIONS)
            parts[i] = (
                rng.choice(["{{ %s }}", "{%% set x = %s %%}", "{%% if %s %%}a{%% endif %%}"])
                % inner
            )
            template = "".join(parts)
    else:
        template = mutated_text(rng, template, WORDS)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = template
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    run = LATRO | {"dataset_name": "chains", "method": "latro", "model_id": str(model)}
    run["train_path"] = str(sound / "chains.jsonl")
    run["test_path"] = str(sound / "chains_test.jsonl")
    del run["tokenizer"]
    (folder / "run.yaml").write_text(yaml.safe_dump(run | {"save_path": str(folder / "runs")}))
    return command(twin, "run", folder / "run.yaml", "--check")


def converters(rng: random.Random, folder: Path, sound: Path, twin: str) -> Callable[[], None]:
    """Official and Hugging Face checkpoints, adapters, and the scripts that make data sets."""
    how = rng.randrange(6)
    if how < 2:
        source = Path(shutil.copytree(sound / "official", folder / "official"))
        damage_some(rng, source)
        given: list[Any] = [source / "checkpoint_1"]
        given += ["--tokenizer", "prosqa", "--config", source / "config.json"]
        return command(twin, "convert", *given[:1], folder / "copy", *given[1:])
    if how == 2:
        source = Path(shutil.copytree(sound / "plain", folder / "plain"))
        damage_some(rng, source)
        return command(twin, "convert", source, folder / "copy", "--tokenizer", "none")
    name, form = rng.choice(
        [("gsm8k", "jsonl"), ("gsm8k", "txt"), ("arc", "jsonl"), ("prontoqa", "json")]
    )
    source = Path(shutil.copy(sound / f"{name}.{form}", folder / f"source.{form}"))
    damage(rng, source)
    out = (
        ["--out-dir", folder, "--split", "1/1/0"]
        if name == "prontoqa"
        else ["--out", folder / "made.json"]
    )
    return script(f"data/{name}.py", source, *out)


def feedback_rules(rng: random.Random, folder: Path, sound: Path, twin: str) -> Callable[[], None]:
    """Rules of the catalogue joined at random and mutated; one update with what is accepted."""
    from coconut.feedback.catalogue import EXAMPLES, SOURCES, TRANSFORMS

    values = ["0", "1", "-1", "0.5", "1e9", "nan", "rel:0.1", "topk:3", "abs:0", "0.5:", "1:9", "x"]
    values += ["residual", "vocab", "learned", "model", "always", "identity", "ridge", "signed"]

    def part(names: dict[str, Any]) -> str:
        name = rng.choice(list(names))
        given = [EXAMPLES[name]] if name in EXAMPLES else []
        for option in rng.sample(list(names[name]), rng.randint(0, min(2, len(names[name])))):
            if option != "hidden":
                given.append(f"{option}={rng.choice(values)}")
        return name + (":" + ",".join(given) if given else "")

    rule = "|".join([part(SOURCES), *(part(TRANSFORMS) for _ in range(rng.randint(0, 2)))])
    if rng.random() < 0.4:
        rule = mutated_text(rng, rule, ("|", ":", "+", "*", "(", ")", ",", "=", "0.5*last"))
    run = yaml.safe_load((sound / "run.yaml").read_text())
    run |= {"save_path": str(folder / "runs"), "feedback": rule, "max_latent_stage": 2}
    run |= {"epochs_per_stage": 1, "num_epochs": 2, "gradient_accumulation_steps": 2}
    (folder / "run.yaml").write_text(to_text(run))
    return command(twin, "run", folder / "run.yaml")


KINDS: dict[Callable[..., Callable[[], None]], int] = {
    configuration: 28,
    data: 16,
    latro_data: 8,
    tokenizers: 12,
    checkpoints: 14,
    templates: 6,
    converters: 10,
    feedback_rules: 6,
}
"""What is mutated, and its share of a hundred inputs."""
BY_NAME = {kind.__name__: kind for kind in KINDS}

# ---- one input


def run_case(kind: str, number: int, seed: int, sound: Path, keep: Path | None) -> dict[str, Any]:
    """What became of an input: its status (None: an exception), message, seconds and megabytes."""
    rng = random.Random(f"{seed}/{kind}/{number}")
    twin = TWINS[number % 2]
    with tempfile.TemporaryDirectory() as scratch:
        folder = keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        call = BY_NAME[kind](rng, folder, sound, twin)
        said = io.StringIO()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # a new high-water mark
        before, begin = _peak(), time.monotonic()
        status: int | None = 0
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            try:
                call()
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
            except BaseException:
                status = None
                traceback.print_exc()
        seconds = time.monotonic() - begin
    return {
        "kind": kind,
        "number": number,
        "twin": twin,
        "status": status,
        "said": said.getvalue()[-4_000:],
        "seconds": seconds,
        "megabytes": _peak() - before,
    }


def _peak() -> float:
    """The most memory that this process has held, in MB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def fault(result: dict[str, Any]) -> str | None:
    """Why an input failed; None if it did not."""
    if result["status"] is None:
        return "traceback"
    if result["status"] not in (0, 2) or "Traceback" in result["said"]:
        return "status"
    if result["status"] == 2 and not result["said"].strip():
        return "nothing said"
    if result["seconds"] > SECONDS:
        return "time"
    return "memory" if result["megabytes"] > MEGABYTES else None


# ---- many inputs


def worker(sound: Path, seed: int) -> None:
    """Answer a line "KIND NUMBER" on stdin by a line of JSON."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for twin in TWINS:
        __import__(f"{twin}.run")
    for line in sys.stdin:
        kind, number = line.split()
        print(json.dumps(run_case(kind, int(number), seed, sound, None)), file=out, flush=True)


class Worker:
    """A process for input after input; another one if it dies or an input takes too long."""

    def __init__(self, sound: Path, seed: int) -> None:
        self._argv = [sys.executable, __file__, "--worker", str(sound), "--seed", str(seed)]
        self._process: subprocess.Popen[str] | None = None

    def ask(self, kind: str, number: int) -> dict[str, Any]:
        """What became of an input."""
        if self._process is None:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(self._argv, stdin=pipe, stdout=pipe, text=True)
            first = 60.0  # libraries are imported
        else:
            first = 0.0
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{kind} {number}\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], first + 3 * SECONDS)
        line = self._process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        said = "killed after" if ready == [] else "its process died after"
        self.close()
        return {
            "kind": kind, "number": number, "twin": TWINS[number % 2], "status": 2, "said": said,
            "seconds": 3 * SECONDS, "megabytes": 0.0,
        }  # fmt: skip

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def fuzz(
    n: int, seed: int, kinds: list[str], sound: Path, say: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """Try n inputs, shared out among the kinds; faults are printed as they come."""
    shares = {kind.__name__: share for kind, share in KINDS.items() if kind.__name__ in kinds}
    results: dict[str, list[dict[str, Any]]] = {}
    workers = Worker(sound, seed)
    for kind, share in shares.items():
        results[kind] = []
        for number in range(max(1, n * share // sum(shares.values()))):
            result = workers.ask(kind, number)
            results[kind].append(result)
            if why := fault(result):
                print(f"--- {why}: --kind {kind} --only {number} ({result['twin']})")
                print(result["said"], flush=True)
            elif say:
                print(kind, number, result["status"], result["said"][-300:])
    workers.close()
    return results


def main() -> int:
    """Try inputs and print the table; status 1 if one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("n", nargs="?", type=int, default=10_000, help="inputs (%(default)s)")
    add("--kind", nargs="+", choices=list(BY_NAME), default=list(BY_NAME))
    add("--seed", type=int, default=0)
    add("--only", type=int, metavar="NUMBER", help="this input of one kind, and what it said")
    add("--say", action="store_true", help="print what each input said")
    add("--keep", type=Path, metavar="DIR", help="with --only: where its files stay")
    add("--into", type=Path, metavar="FILE.md", help="put the table between its markers there")
    add("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.seed)
        return 0
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        sound = Path(folder) / "sound"
        sound.mkdir()
        with contextlib.redirect_stdout(io.StringIO()):
            prepare(sound)
        if options.only is not None:
            result = run_case(options.kind[0], options.only, options.seed, sound, options.keep)
            print(result.pop("said"))
            print(json.dumps(result))
            return int(fault(result | {"said": "-"}) is not None)
        results = fuzz(options.n, options.seed, options.kind, sound, options.say)
    rows, failed = [], 0
    for kind, some in [
        *results.items(),
        ("all", [one for part in results.values() for one in part]),
    ]:
        faults = collections.Counter(filter(None, map(fault, some)))
        failed = sum(faults.values())
        rows.append(
            [
                kind.replace("_", " "),
                f"{len(some):,}",
                f"{sum(one['status'] == 2 for one in some):,}",
                str(failed),
                f"{max(one['seconds'] for one in some):.1f} s",
                f"{max(one['megabytes'] for one in some):.0f} MB",
            ]
        )
    text = table(["mutated", "tried", "refused", "failed", "longest", "most memory"], rows)
    print(text)
    print(f"seed {options.seed}, {time.monotonic() - begin:,.0f} s")
    if options.into:
        replace_table(options.into, "fuzz", text)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
