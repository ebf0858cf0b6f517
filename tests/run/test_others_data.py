"""Data and tokenizers as other people have them: trained and evaluated, in both twins."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import few, gpt2_encoding
from tiny import REPOSITORY, random_gpt2

from coconut.batches.dataset import read_items, tokenize
from coconut.batches.questions import Questions
from coconut.commands.run import main
from coconut.config.reading import check_config
from coconut.text.opening import load_tokenizer

CASES = REPOSITORY / "tests/cases"
FILES = {
    "09_empty_step": "items.json",
    "11_json_lines": "items.jsonl",
    "14_word_start_tokenizer": "items.json",
}


@pytest.mark.parametrize("case", few(FILES, 1))
def test_what_failed_trains_and_evaluates(twin, tmp_path, case, capsys) -> None:
    data = str(CASES / case / FILES[case])
    tokenizer = str(CASES / case) if "tokenizer" in case else "bytes"
    rows = len(load_tokenizer(tokenizer))
    random_gpt2(tmp_path / "model", rows, 8, n_positions=160)
    values = {
        "name": "case",
        "save_path": str(tmp_path / "runs"),
        "method": "coconut",
        "model_id": str(tmp_path / "model"),
        "tokenizer": tokenizer,
        "train_path": data,
        "val_path": data,
        "max_latent_stage": 1,
        "epochs_per_stage": 1,
        "num_epochs": 2,
        "max_new_tokens": 3,
        "report": False,
    }
    run = tmp_path / "run.yaml"
    run.write_text(json.dumps(values))
    main(twin.__name__, twin.run.make_backend, [str(run), "--check"])
    main(twin.__name__, twin.run.make_backend, [str(run)])
    trained = tmp_path / "runs/case/epoch_02"
    more = ["only_eval=True", f"load_model_path={trained}", "name=again", "tokenizer=null"]
    main(twin.__name__, twin.run.make_backend, [str(run), *more])
    assert "Traceback" not in capsys.readouterr().err
    for name in ("case", "again"):
        lines = (tmp_path / f"runs/{name}/predictions.jsonl").read_text().splitlines()
        assert [json.loads(line)["gold"] for line in lines] == ["7", "5"]


@pytest.fixture
def shared() -> Path:
    directory = os.environ.get("COCONUT_SHARED_DATA")
    if not directory:
        pytest.skip("COCONUT_SHARED_DATA is not set: no whole public files to read")
    return Path(directory)


def test_every_item_of_the_icot_files_loads_by_the_published_rule(shared, tmp_path) -> None:
    from data.gsm8k import read

    tokenizer, n_empty = gpt2_encoding().with_latents(), 0
    for part, n in (("valid", 500), ("test", 1319)):
        items = read(shared / f"gsm8k/icot_{part}.txt")
        (tmp_path / f"{part}.json").write_text(
            json.dumps([item | {"steps": item["steps"] or [""]} for item in items])
        )
        found = read_items(tmp_path / f"{part}.json")
        samples = tokenize(found, tokenizer, part)
        n_empty += sum(item["steps"] == [""] for item in found)
        assert len(samples) == n and all(len(sample.steps) >= 1 for sample in samples)
    assert n_empty == 6 + 18


# ---- one reader for LaTRO's questions, too


@pytest.mark.parametrize(
    ("fields", "rationale"),
    [
        ({"steps": ["<<2+3=5>>", "<<5*2=10>>"]}, "<<2+3=5>>\n<<5*2=10>>\n"),
        ({"cot": "<<2+3=5>> <<5*2=10>>"}, "<<2+3=5>>\n<<5*2=10>>\n"),
        ({"steps": [""]}, None),
    ],
)
@pytest.mark.parametrize("as_list", [True, False])
def test_gsm8k_reads_what_coconut_reads(tmp_path, fields, rationale, as_list) -> None:
    item = {"question": "Ada has 2 pens. How many?", "answer": "10"} | fields
    path = tmp_path / "items.json"
    path.write_text(json.dumps([item]) if as_list else json.dumps(item) + "\n")
    values = {"method": "latro", "only_eval": True, "dataset_name": "gsm8k", "model_id": "x"}
    values["stop_token"] = "eos"
    config = check_config(values | {"test_path": str(path)})
    (found,) = Questions(config, gpt2_encoding()).items("test")
    assert (found["gold"], found.get("rationales")) == ("10", rationale)
    trained = Questions(
        check_config(values | {"method": "sft", "test_path": str(path)}), gpt2_encoding()
    )
    (sample,) = trained.samples([found])
    text = gpt2_encoding().decode(sample.answer)
    assert text == f"{rationale or ''}The answer is 10"
