"""A stranger's data: a file of three columns, or a data set outside of the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_latro_runner import REPOSITORY, config, run

from coconut.config.reading import check_config
from coconut.errors import UserError
from coconut.run.answering import evaluate_data_set
from coconut.tasks import questions
from coconut.tasks.questions._columns import exact


def three_columns(folder: Path, n: int = 60, **changes) -> Path:
    """The first items of chains under the published names, in a file of JSON lines."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        lines = (REPOSITORY / f"data/chains_{split}.jsonl").read_text().splitlines()[:n]
        rows = [json.loads(line) for line in lines]
        path = folder / f"mine_{split}.jsonl"
        path.write_text("".join(
            json.dumps({
                "queries": row["question"] + ":",
                "responses": f"={row['groundtruth']}.",
                "groundtruth": row["groundtruth"],
                **({"rationales": row["rationales"]} if "rationales" in row else {}),
                **changes,
            }) + "\n" for row in rows
        ))  # fmt: skip
    return folder / "mine_train.jsonl"


OWN = {"train_path": None, "test_path": None, "validation_items": 20}


def test_a_file_of_three_columns_trains_and_is_evaluated(twin, tmp_path):
    path = str(three_columns(tmp_path / "data"))
    made = config(tmp_path, dataset_name=path, reward="correct", total_updates=1, **OWN)
    (update,) = run(twin, made)
    assert 0 <= update["reward/correct"] <= 1
    values = {"load_model_path": str(made.run_dir / "update_0001"), "method": "latro"}
    asked = check_config(
        values
        | {"only_eval": True, "dataset_name": path, "save_path": str(tmp_path), "name": "asked"}
        | {"stop_token": "eos", "response_length": 5}
    )
    evaluate_data_set(asked, twin.run.make_backend, twin.__name__)
    (line, *_) = (asked.run_dir / "predictions.jsonl").read_text().splitlines()
    assert (
        json.loads(line)["gold"]
        == json.loads((tmp_path / "data/mine_test.jsonl").read_text().splitlines()[0])[
            "groundtruth"
        ]
    )


@pytest.mark.parametrize(
    "line, complaint",
    [
        ('{"queries": "1:", "responses": "=5"}', r"line 3: field 'groundtruth' is missing"),
        ('{"queries": "1:", "responses": "=5", "groundtruth": 5}', r"line 3: field 'groundtruth' "),
        ('{"queries": "", "responses": "=5", "groundtruth": "5"}', r"line 3: field 'queries' is "),
        ('{"queries": "1:", "responses": "=", "groundtruth": "5"}', r"line 3: responses does not"),
        ('{"queries": "1:"', r"line 3: not JSON"),
        ("[1]", r"line 3: expected an object"),
    ],
)
def test_a_broken_line_of_it_is_named(tmp_path, line, complaint):
    path = three_columns(tmp_path / "data")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[3:]]))
    with pytest.raises(UserError, match=rf"mine_train\.jsonl {complaint}"):
        questions.load(str(path)).read(str(path))


@pytest.mark.parametrize(
    "output, answer",
    [
        ("first 3. The answer is 7.", "7"),
        ("The answer is 7", "7"),
        ("The answer is 1. No. The answer is 7.\nBye", "7"),
        ("The answer is seven", "seven"),
        ("It is 7.", ""),
        ("", ""),
    ],
)
def test_an_answer_stands_where_the_response_has_it(output, answer):
    item = {"responses": "The answer is 42.", "groundtruth": "42"}
    assert exact(output, item) == answer
    assert exact(item["responses"], item) == "42"
    assert exact("so\n7", {"responses": "7", "groundtruth": "7"}) == "7"


def test_answers_are_read_as_another_data_set_does(tmp_path):
    path = three_columns(tmp_path / "data", responses="It makes 1,000 in all", groundtruth="1000")
    with pytest.raises(UserError, match="line 1: responses does not hold"):
        questions.load(str(path)).read(str(path))
    gsm8k = questions.load(f"gsm8k:{path}")
    (item, *_) = gsm8k.read(str(path))
    assert gsm8k.answer(gsm8k.response(item), item) == "1000"


def test_a_data_set_of_ones_own_lies_anywhere(twin, tmp_path):
    three_columns(tmp_path / "data")
    text = (REPOSITORY / "coconut/tasks/questions/chains.py").read_text()
    text += "\nREWARDS = {'brevity': lambda prompt, rationale, answer, truth: -len(rationale)}\n"
    (tmp_path / "mine.py").write_text(text)
    keys = {"dataset_name": str(tmp_path / "mine.py"), "reward": "brevity", "total_updates": 1}
    (update,) = run(twin, config(tmp_path, **keys))
    assert update["objective/reward"] == update["reward/brevity"] < 0
    (tmp_path / "mine.py").write_text(text + "x = 1 / 0\n")
    with pytest.raises(UserError, match=r"mine\.py line \d+: cannot be imported \(ZeroDivision"):
        questions.load(str(tmp_path / "mine.py"))


@pytest.mark.parametrize(
    "name, complaint",
    [
        ("gone.jsonl", "no such file: gone.jsonl"),
        ("gone.py", "no such file: gone.py"),
        ("chian", "did you mean chains"),
        ("nothing:FILE", "stands the data set whose answers"),
    ],
)
def test_a_name_that_is_none_is_answered(tmp_path, name, complaint):
    path = three_columns(tmp_path / "data")
    with pytest.raises(UserError, match=f"dataset_name: .*{complaint}"):
        config(tmp_path, dataset_name=name.replace("FILE", str(path)))
