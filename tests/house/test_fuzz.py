"""Arbitrary input: success or a UserError, never another exception, never a half-written file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_source import IDS, MARKED, checkpoint
from tiny import zero_model

from coconut.batches.curriculum import Markers, item_rng, longest_row, training_row
from coconut.batches.dataset import read_items, tokenize
from coconut.checkpoints.source import open_source
from coconut.config.keys import RunConfig
from coconut.config.lora_keys import Lora
from coconut.config.reading import check_config, load_config
from coconut.errors import UserError
from coconut.plan.plan import print_plan
from coconut.run.saving import newest_checkpoint
from coconut.text.tiktoken import prosqa_encoding

TOKENIZER = prosqa_encoding().with_latents()
ROOT = Path(__file__).parents[2]

bounded = settings(
    examples(40), suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def survives(call: Callable[[], object]) -> bool:
    """Whether it succeeded; a UserError must be readable, anything else passes through."""
    try:
        call()
    except UserError as error:
        message = str(error)
        assert message and all(problem.strip() for problem in error.problems)
        assert len(message.splitlines()) <= len(error.problems) + 1
        message.encode("utf-8", "surrogateescape")
        return False
    return True


# ---- configurations

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(2**60, 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["None", "1e-4", "gpt2", "coconut", "stage", "", "\0", "a" * 300, "é" * 200])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = [f.name for f in fields(RunConfig)] + [f"lora.{f.name}" for f in fields(Lora)]
GENERATE = ["items", "fresh", "seed", "nodes", "min_hops", "max_hops", "swapped", "equal_depth"]
mappings = st.dictionaries(
    st.sampled_from(KEYS) | st.text(max_size=10) | st.integers() | st.none(), values, max_size=8
)


@pytest.fixture
def base(tmp_path: Path) -> dict:
    """A right configuration that needs a file and a model of a few bytes."""
    item = {"question": "Tom is a wumpus. Who?", "answer": "Tom", "steps": ["a", "b"]}
    (tmp_path / "data.json").write_text(json.dumps([item] * 3))
    return {
        "method": "coconut",
        "model_config_path": str(ROOT / "args" / "models" / "tiny_gpt2.json"),
        "tokenizer": "prosqa",
        "train_path": str(tmp_path / "data.json"),
        "val_path": str(tmp_path / "data.json"),
        "save_path": str(tmp_path / "runs"),
    }


@pytest.mark.slow
@bounded
@given(mappings)
def test_any_mapping_is_a_configuration_or_refused(changes: dict) -> None:
    survives(lambda: check_config(changes))


@bounded
@given(st.dictionaries(st.sampled_from(GENERATE) | st.text(max_size=5), scalars, max_size=5))
def test_any_generate_group_is_accepted_or_refused(base: dict, generate: dict) -> None:
    survives(lambda: check_config(base | {"generate": generate}))


@bounded
@given(changes=mappings)
def test_what_is_accepted_is_written_and_read_back_the_same(
    base: dict, tmp_path: Path, changes: dict
) -> None:
    accepted = []
    for key, value in changes.items():
        if survives(lambda key=key, value=value: check_config(base | {key: value})):
            accepted.append({key: value})
    for change in accepted:
        config = check_config(base | change)
        (tmp_path / "resolved.yaml").write_text(config.to_yaml(), encoding="utf-8")
        assert load_config(tmp_path / "resolved.yaml") == config


@bounded
@given(text=st.text(max_size=80) | st.text("{}[]:,-&*!|>'\"%@`?# \n\tab1e.~", max_size=40))
def test_any_text_is_a_configuration_file_or_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    survives(lambda: load_config(path))


@bounded
@given(content=st.binary(max_size=60))
def test_any_bytes_are_a_configuration_file_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    survives(lambda: load_config(path))


@bounded
@given(
    overrides=st.lists(
        st.text(max_size=15)
        | st.builds(
            "{}={}".format,
            st.sampled_from([*KEYS, "generate.items", "generate.x", "lr.x"]),
            st.text(max_size=10) | scalars.map(str) | st.sampled_from(["!!bool x", "[", "&a [*a]"]),
        ),
        max_size=3,
    )
)
def test_any_override_is_applied_or_refused(
    base: dict, tmp_path: Path, overrides: list[str]
) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(base))
    survives(lambda: load_config(tmp_path / "run.yaml", overrides))


numbers = st.integers(0, 12)


@bounded
@given(
    method=st.sampled_from(["coconut", "pause", "icot", "recall", "no_thoughts", "no_cot", "cot"]),
    keys=st.fixed_dictionaries(
        {
            "c_thought": st.integers(0, 4),
            "max_latent_stage": numbers,
            "epochs_per_stage": st.integers(1, 4),
            "num_epochs": st.integers(0, 6),
            "resume": st.integers(0, 4),
            "uniform_prob": st.sampled_from([0, 0.5, 1]),
            "stage_mixing": st.sampled_from(["none", "item", "batch"]),
            "latent_growth": st.sampled_from(["stage", "one"]),
            "pad_latent_to_max": st.booleans(),
            "icot_smoothing": st.floats(0, 1e6),
            "icot_tokens_per_epoch": st.floats(0, 1e6),
        }
    ),
)
def test_every_accepted_run_has_a_plan(base: dict, capsys, method: str, keys: dict) -> None:
    survives(lambda: print_plan(check_config(base | keys | {"method": method}), "mlx_coconut"))
    assert not Path(base["save_path"]).exists()


# ---- data

texts = st.text(max_size=12) | st.sampled_from(["a b.", "### x", "<|latent|>", "\ud800", "\n", " "])
fields = texts | scalars | st.lists(texts | scalars, max_size=3)
items = (
    st.fixed_dictionaries(
        {"question": texts, "answer": texts, "steps": st.lists(texts, max_size=4)},
        optional={"latents": st.integers(-1, 5) | scalars, "edges": fields},
    )
    | st.dictionaries(st.sampled_from(["question", "answer", "steps", "x"]), fields)
    | scalars
)


@bounded
@given(content=st.lists(items, max_size=4) | values)
def test_any_items_become_rows_or_are_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "items.json"
    path.write_text(json.dumps(content))  # NaN and lone surrogates included

    def rows() -> None:
        run = RunConfig(method="coconut", c_thought=2)
        markers = Markers(*IDS)
        for sample in tokenize(read_items(path), TOKENIZER, str(path)):
            for stage in range(5):
                made = training_row(run, sample, stage, markers, item_rng(0, 0, sample.idx))
                assert len(made.ids) == len(made.labels or ())
                assert len(made.ids) <= longest_row(run, sample, range(5))

    survives(rows)


@bounded
@given(content=st.binary(max_size=60) | st.text('[]{}":,\\u d8nulltrue01e.', max_size=40))
def test_any_bytes_are_a_data_file_or_refused(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "items.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    survives(lambda: read_items(path))


# ---- checkpoints

MODEL = json.loads((ROOT / "args" / "models" / "tiny_gpt2.json").read_text())


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as a run leaves it, of the smallest kind."""
    directory = checkpoint(
        tmp_path_factory.mktemp("sound") / "epoch_01",
        len(MARKED),
        method="coconut",
        latent_ids=IDS,
        stage=1,
    )
    zero_model(directory, **MODEL | {"vocab_size": len(MARKED)})
    state = {"epoch": 1, "update_in_epoch": 0, "n_updates": 3, "seed": 0}
    (directory / "trainer_state.json").write_text(json.dumps(state))
    return directory


FILES = [
    "config.json",
    "coconut.json",
    "trainer_state.json",
    "model.safetensors",
    "encoding.json",
    "encoding.tiktoken",
    "tokenizer.json",
]
damages = st.one_of(
    st.tuples(st.just("delete"), st.sampled_from(FILES)),
    st.tuples(st.just("cut"), st.sampled_from(FILES), st.floats(0, 1)),
    st.tuples(st.just("flip"), st.sampled_from(FILES), st.floats(0, 0.999), st.integers(1, 255)),
    st.tuples(st.just("write"), st.sampled_from(FILES), st.binary(max_size=30)),
    st.tuples(
        st.just("json"),
        st.sampled_from(["config.json", "coconut.json", "trainer_state.json", "encoding.json"]),
        st.integers(0, 20),
        values,
    ),
)


def damage(directory: Path, kind: str, name: str, *how) -> None:
    path = directory / name
    if kind == "delete":
        path.unlink(missing_ok=True)
    elif kind == "write":
        path.write_bytes(how[0])
    elif path.exists() and kind == "json":
        try:
            content = json.loads(path.read_bytes())
        except ValueError:
            return
        if isinstance(content, dict) and content:
            content[sorted(content)[how[0] % len(content)]] = how[1]
            path.write_text(json.dumps(content))
    elif path.exists():
        content = bytearray(path.read_bytes())
        at = int(how[0] * len(content))
        if kind == "cut":
            del content[at:]
        elif content:
            content[at] ^= how[1]
        path.write_bytes(content)


@bounded
@given(harm=st.lists(damages, min_size=1, max_size=3))
def test_a_damaged_checkpoint_is_opened_or_refused(
    base: dict, sound: Path, tmp_path: Path, capsys, harm: list[tuple]
) -> None:
    run_dir = Path(base["save_path"]) / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(sound, run_dir / "epoch_01")
    for one in harm:
        damage(run_dir / "epoch_01", *one)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}

    def opened() -> None:
        config = check_config(base | {"num_epochs": 3})
        open_source(config, newest_checkpoint(run_dir))
        print_plan(config, "mlx_coconut")

    def evaluated() -> None:
        more = {"only_eval": True, "load_model_path": str(run_dir / "epoch_01")}
        print_plan(check_config(base | more), "mlx_coconut")

    survives(opened)
    survives(evaluated)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_the_undamaged_checkpoint_is_opened(base: dict, sound: Path, capsys) -> None:
    more = {"only_eval": True, "load_model_path": str(sound)}
    assert survives(lambda: print_plan(check_config(base | more), "mlx_coconut"))
    assert "at stage 1 (the checkpoint's own)" in capsys.readouterr().out
