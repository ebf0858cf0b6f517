"""Pointer chasing: items, what is held out, the command, and that thoughts are needed for it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from coconut.errors import UserError
from coconut.tasks.generated import read_keys
from coconut.tasks.suite import hops

ROOT = Path(__file__).parents[2]
OPTIONS = hops.Options(concepts=5, hops=3)


def follow(question: str, n_hops: int) -> list[str]:
    """The concepts behind the asked name, by reading the sentences."""
    *facts, asked = question.split(". ")
    successor = dict(fact.removeprefix("Every ").split(" is a ") for fact in facts)
    at, found = successor[asked.removeprefix("Is ").removesuffix("?")], []
    for _ in range(n_hops):
        at = successor[at]
        found.append(at)
    return found


def test_steps_and_answer_follow_the_circle():
    items = list(hops.generate(OPTIONS, 1, 50))
    for item in items:
        reached = follow(item["question"], 3)
        assert item["steps"] == [f" is a {concept}." for concept in reached]
        assert item["answer"].endswith(f" is a {reached[-1]}.")
        assert len(set(follow(item["question"], 5))) == 5  # one circle through all
    first = {item["question"].split(". ")[0] for item in items}
    assert len(first) > 15  # statements in any order
    answers = [item["answer"].rsplit(" ")[-1] for item in items]
    assert set(answers) == {f"{word}." for word in hops.CONCEPTS[:5]}


def test_thoughts_name_what_steps_would_say():
    plain = list(hops.generate(OPTIONS, 1, 20))
    labelled = list(hops.generate(hops.Options(concepts=5, hops=3, steps="thoughts"), 1, 20))
    for a, b in zip(plain, labelled, strict=True):
        assert b == a | {"steps": [], "latents": 3, "thoughts": a["steps"]}


def test_a_run_is_a_prefix_of_a_longer_one_and_can_be_made_in_parts():
    whole = list(hops.generate(OPTIONS, 4, 12))
    assert list(hops.generate(OPTIONS, 4, 5)) + list(hops.generate(OPTIONS, 4, 7, 5)) == whole
    assert list(hops.generate(OPTIONS, 5, 12)) != whole


def test_circles_held_out_do_not_come_whoever_is_asked():
    held_out = list(hops.generate(OPTIONS, 1, 6))
    keys = {key for item in held_out for key in hops.keys(item)}
    asked_otherwise = held_out[0] | {"question": held_out[0]["question"].replace("Tom", "Max")}
    assert set(hops.keys(asked_otherwise)) <= keys
    made = hops.generate(OPTIONS, 2, 100, exclude=keys)
    assert not any(key in keys for item in made for key in hops.keys(item))
    # Of five concepts there are 24 circles.
    everything = {key for item in hops.generate(OPTIONS, 3, 500) for key in hops.keys(item)}
    assert len(everything) == 24
    with pytest.raises(UserError, match="no circle of 5 concepts is left"):
        next(hops.generate(OPTIONS, 3, 1, exclude=everything))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"concepts": 2}, "concepts: expected 3 to 38, got 2"),
        ({"concepts": 5, "hops": 5}, "hops: expected 1 to 4, got 5"),
        ({"hops": 0}, "hops: expected 1 to 7, got 0"),
        ({"hops": "many"}, "hops: expected a whole number"),
        ({"steps": "walk"}, "steps: expected path, thoughts"),
    ],
)
def test_options_that_cannot_be_are_refused(options, complaint):
    with pytest.raises(UserError, match=complaint):
        hops.Options(**options)


def test_the_shipped_file_is_what_the_command_writes(tmp_path):
    out = tmp_path / "hops_valid.json"
    command = [sys.executable, "data/hops.py", "--items", "300", "--seed", "2", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"wrote 300 items | {out} | seed 2\n"
    assert out.read_bytes() == (ROOT / "data/hops_valid.json").read_bytes()
    other = tmp_path / "other.json"
    command = [*command[:-1], str(other), "--disjoint", str(out)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    assert not read_keys(out, hops.keys) & read_keys(other, hops.keys)
    done = subprocess.run([*command, "--hops", "9"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "hops: expected 1 to 7, got 9" in done.stderr


def test_generated_training_data_leave_the_validation_circles_out(tmp_path):
    from test_dataset import data

    path = tmp_path / "val.json"
    path.write_text(json.dumps(list(hops.generate(OPTIONS, 1, 10))))
    generate = {"task": "hops", "items": 60, "concepts": 5, "hops": 3, "fresh": True}
    training = data(val_path=str(path), generate=generate)
    items = list(itertools.chain(training.preview(30)[0], training.preview(60)[0][30:]))
    keys = read_keys(path, hops.keys)
    assert len(items) == 60 and not any(k in keys for item in items for k in hops.keys(item))
    assert len(training.samples(0)) == 60
    assert training.samples(1)[0].question != training.samples(0)[0].question
