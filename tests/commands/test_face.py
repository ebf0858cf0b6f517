"""The Python face: the same as the commands, silent, with errors that are raised."""

from __future__ import annotations

import html.parser
import importlib
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from conftest import CHOSEN, TWINS
from lenses import ANSWER, QUESTION, write_checkpoint
from tiny import REPOSITORY, run_config, write_items

from coconut.batches.batch import collate
from coconut.commands import generate as generate_command
from coconut.commands import run as run_command
from coconut.errors import UserError
from coconut.inside import inspect as inspect_command

OTHER = QUESTION.replace("Is Tom a", "Is Sam a")


@pytest.fixture(params=CHOSEN)
def face(request) -> ModuleType:
    """A twin's package, as its user imports it."""
    return importlib.import_module(TWINS[request.param])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two random checkpoints, one that thinks and one that does not, and items to ask."""
    folder = tmp_path_factory.mktemp("face")
    # A rule that tells what is fed back from what the output head reads.
    write_checkpoint(folder / "thinks", "pairs", feedback="last|rms")
    write_checkpoint(folder / "plain", "pairs", method="cot", latent_ids=None, stage=0)
    write_items(folder / "items.json", 3)
    return folder


def command(main, face: ModuleType, *argv: object) -> None:
    main(face.__name__, face.make_backend, [str(arg) for arg in argv])


# ---- opening


@pytest.mark.parametrize("name", CHOSEN)
def test_importing_a_twin_opens_no_framework(name: str) -> None:
    heavy = ("mlx.core", "torch", "numpy", "yaml", "rich", "transformers", "huggingface_hub")
    code = (
        f"import sys, {TWINS[name]} as twin\n"
        f"print([m for m in {heavy} if m in sys.modules], *sorted(twin.__all__))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.stdout.split() == ["[]", *"evaluate generate load make_backend think train".split()]


def test_a_model_is_found_by_the_name_it_ships_under(face, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = face.load("prosqa")
    assert model.directory == REPOSITORY / "data/checkpoints/prosqa" and model.n_thoughts == 6
    about = (model.directory, face.__name__, "coconut_no_curriculum", "6 thoughts")
    assert repr(model) == f"<{' | '.join(map(str, about))}>"


def test_what_is_there_to_mend_is_raised(face, folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, plain = face.load(folder / "thinks"), face.load(str(folder / "plain"))
    for call, said in (
        (lambda: face.load("no-such-model"), "no-such-model: not "),
        (lambda: face.load(folder / "plain", latents=1), "was trained by cot, which has no"),
        (lambda: face.load(folder / "thinks", latents=-1), "latents must be at least 0, got -1"),
        (
            lambda: face.generate(plain, "Who?", latents=2),
            "plain: was trained by cot, which has no",
        ),
        (
            lambda: face.generate(model, "Who?", latents=-1),
            "arguments: latents: must be at least 0",
        ),
        (
            lambda: face.generate(model, "Who?", temperature=float("nan"), max_new_tokens=0),
            "arguments: 2 problems\n  max_new_tokens: must be at least 1, got 0\n  temperature: ",
        ),
        (
            lambda: face.generate(model, ["Who?", " "]),
            "questions: number 1: expected a text, got ' '",
        ),
        (lambda: face.generate(model, "Who?" * 200), "questions: number 0: "),
        (lambda: face.think(model, ""), "question: is empty"),
        (lambda: face.think(model, "Who?", top=0), "arguments: top: must be at least 1, got 0"),
        (lambda: face.think(model, "Who?", reading="x"), "reading: expected one of step, fact, "),
        (lambda: face.evaluate(model, tmp_path / "no.json"), "val_path: no such file: "),
        (lambda: face.evaluate(model, []), "items: holds no items"),
        (
            lambda: face.evaluate(model, [{"question": "Who?"}]),
            "items: 2 problems\n  item 0: answer",
        ),
        (lambda: face.train(tmp_path / "no.yaml"), "no.yaml: no such file"),
        (
            lambda: face.train({"method": "cot", "sed": 1}, lr="fast"),
            "configuration: 5 problems\n  sed: unknown key, did you mean seed?\n  lr: expected a ",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            call()
    assert list(tmp_path.iterdir()) == []


# ---- asking


@pytest.mark.parametrize("given", [{}, {"latents": 1, "temperature": 0.9, "seed": 3}])
def test_generate_gives_what_the_command_prints(face, folder, capsys, given) -> None:
    options = {"max_new_tokens": 8, "batch_size": 2, **given}
    typed = [x for n, v in options.items() for x in (f"--{n.replace('_', '-')}", v)]
    questions = [QUESTION, OTHER, "Who is Tom?"]
    asked = [x for question in questions for x in ("--question", question)]
    main = generate_command.main
    command(main, face, "--model", folder / "thinks", *asked, *typed, "--json")
    printed = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    model = face.load(folder / "thinks")
    assert face.generate(model, questions, **options) == printed
    assert len(set(printed)) == 3
    assert face.generate(model, tuple(questions), **options) == printed
    assert face.generate(model, questions[0], **options) == printed[0]
    assert face.generate(model, []) == []
    out, err = capsys.readouterr()
    assert (out, err) == ("", "")


def test_latents_hold_for_one_call_or_for_the_model(face, folder) -> None:
    model, fixed = face.load(folder / "thinks"), face.load(folder / "thinks", latents=1)
    own, one = (face.generate(m, QUESTION, max_new_tokens=8) for m in (model, fixed))
    assert own != one == face.generate(model, QUESTION, latents=1, max_new_tokens=8)
    assert own == face.generate(fixed, QUESTION, latents=3, max_new_tokens=8)
    assert face.generate(model, QUESTION, max_new_tokens=8) == own
    assert [len(face.think(m, QUESTION, max_new_tokens=1).top) for m in (model, fixed)] == [3, 1]


# ---- looking inside


def test_think_gives_the_arrays_of_the_back_end_and_reads_them(face, folder) -> None:
    model = face.load(folder / "thinks")
    thoughts = face.think(model, QUESTION, latents=2, top=4, max_new_tokens=8)
    row = model.prompt(QUESTION, 2)
    trace = model.backend.trace(collate([row], model.tokenizer.pad_id))
    for ours, theirs in (
        (thoughts.states, trace.states),
        (thoughts.vectors, trace.thoughts),
        (thoughts.logprobs, trace.logprobs),
        (thoughts.attention, trace.attention),
    ):
        assert ours.dtype == np.float32 and np.array_equal(ours, theirs)
    assert not np.array_equal(thoughts.states, thoughts.vectors)
    T = len(row.ids)
    assert thoughts.vectors.shape == (2, 32) and thoughts.attention.shape == (2, 2, 4, T)
    for top, logprobs in zip(thoughts.top, thoughts.logprobs, strict=True):
        best = np.argsort(-logprobs, kind="stable")[:4]
        assert top == [(model.spell(int(i)), float(np.exp(logprobs[i]))) for i in best]
    texts = [stop.text.strip() for stop in thoughts.found.stops]
    asked = [face.generate(model, QUESTION, latents=k, max_new_tokens=8) for k in range(3)]
    assert texts == asked and len(thoughts.answers) == 3
    assert thoughts.graph.names == [thoughts.graph.nodes.index(n) for n in ("Tom", "Sam")]
    assert thoughts.found.gold == ANSWER
    assert face.think(model, "Who?", answer="Tom", max_new_tokens=1).found.gold == "Tom"


def test_a_model_without_thoughts_has_no_arrays(face, folder) -> None:
    thoughts = face.think(face.load(folder / "plain"), "Who?", max_new_tokens=2)
    assert thoughts.states is thoughts.vectors is thoughts.logprobs is thoughts.attention is None
    assert (thoughts.top, thoughts.graph, len(thoughts.answers)) == ([], None, 1)
    assert repr(thoughts).splitlines()[0] == "0 thoughts" and thoughts._repr_html_()


class Elements(html.parser.HTMLParser):
    """The elements of a text with their attributes, nothing inside of an attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_a_notebook_shows_the_page_of_inspect_and_nothing_leaves_its_frame(
    face, folder, tmp_path
) -> None:
    question = 'Who? "></iframe><script>alert(1)</script>'
    more = ("--question", question, "--max-new-tokens", 2, "--reading", "fact", "--latents", 2)
    main = inspect_command.main
    command(main, face, "--model", folder / "thinks", *more, "--html", tmp_path / "page.html")
    model = face.load(folder / "thinks")
    thoughts = face.think(model, question, latents=2, max_new_tokens=2, reading="fact")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert thoughts.page() == page and "alert(1)" in page
    [(tag, attributes)] = Elements(thoughts._repr_html_()).found
    assert tag == "iframe" and attributes["srcdoc"] == page
    # Without `allow-same-origin` the page's scripts reach neither the notebook nor its cookies.
    assert attributes["sandbox"] == "allow-scripts"
    assert repr(thoughts) == "\n".join(
        [
            "2 thoughts",
            *(f"after {k}: {a or '(no answer)'}" for k, a in enumerate(thoughts.answers)),
        ]
    )


# ---- runs

TIMES = (
    "seconds",
    "samples_per_second",
    "peak_memory_bytes",
    "active_memory_bytes",
    "cached_memory_bytes",
)


def without_times(summary: dict) -> dict:
    return {name: value for name, value in summary.items() if name not in TIMES}


def test_evaluate_gives_the_summary_of_the_command(
    face, folder, tmp_path, capfd, monkeypatch
) -> None:
    model, said = face.load(folder / "thinks"), []
    kind = type(model.backend)
    plain = kind.generate

    def generate(self, *given, **keys):
        said.append(plain(self, *given, **keys))
        return said[-1]

    monkeypatch.setattr(kind, "generate", generate)
    keys = {"load_model_path": str(folder / "thinks"), "val_path": str(folder / "items.json")}
    keys |= {"method": "coconut", "max_latent_stage": 3, "latent_growth": "one"}
    keys |= {"n_latents": 2, "max_new_tokens": 6, "temperature": 0.8, "seed": 5, "stage": 2}
    (tmp_path / "run.yaml").write_text(json.dumps(keys | {"only_eval": True}))
    command(run_command.main, face, tmp_path / "run.yaml", f"save_path={tmp_path}", "name=it")
    wanted = without_times(json.loads((tmp_path / "it/summary.json").read_text()))
    capfd.readouterr()
    typed = said.copy()
    said.clear()

    given = {"max_new_tokens": 6, "temperature": 0.8, "seed": 5, "stage": 2}
    found = face.evaluate(model, folder / "items.json", latents=2, **given)
    assert without_times(found) == wanted and "swapped_accuracy" in found
    assert said == typed
    fixed = face.load(folder / "thinks", latents=2)
    items = json.loads((folder / "items.json").read_text())
    listed = face.evaluate(fixed, items, **given)
    of_file = ("data", "data_sha256")
    assert {n: v for n, v in without_times(listed).items() if n not in of_file} == {
        n: v for n, v in wanted.items() if n not in of_file
    }
    assert listed["data"] is None
    alone = face.evaluate(model, items, max_new_tokens=1, swap_test=False, batch_size=2)
    assert "swapped_accuracy" not in alone and alone["n_latents"] == [3, 3]
    assert capfd.readouterr() == ("", "")


def test_a_model_trained_over_a_data_set_is_evaluated_as_a_run(face, tmp_path) -> None:
    write_checkpoint(tmp_path / "latro", "pairs", method="latro", latent_ids=None, stage=0)
    with pytest.raises(UserError, match=r"trained by latro .*; evaluate it by train\("):
        face.evaluate(face.load(tmp_path / "latro"), [])


def test_train_does_the_run_of_the_command_and_goes_on(face, tmp_path, capfd) -> None:
    keys = run_config(tmp_path, num_epochs=1).to_yaml()
    (tmp_path / "run.yaml").write_text(keys)
    command(run_command.main, face, tmp_path / "run.yaml", "name=typed")
    printed = capfd.readouterr().out
    run = face.train(tmp_path / "run.yaml", name="called")
    assert capfd.readouterr() == ("", "")
    assert (
        run.directory == tmp_path / "runs/called" and run.checkpoint == run.directory / "epoch_01"
    )
    typed = tmp_path / "runs/typed"
    weights = [d / "epoch_01/model.safetensors" for d in (typed, run.directory)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    summary = json.loads((typed / "summary.json").read_text())
    ignored = {name: None for name in (*TIMES, "checkpoint")}
    assert run.summary | ignored == summary | ignored

    again = face.train(tmp_path / "run.yaml", verbose=True, name="called", num_epochs=2)
    assert again.checkpoint == run.directory / "epoch_02" and again.summary["epoch"] == 2
    said = capfd.readouterr().out
    assert "continuing" in said and said.splitlines()[0].startswith(f"{face.__name__} | ")
    assert printed.splitlines()[0] == said.splitlines()[0].replace("called", "typed")
    assert face.generate(face.load(again.checkpoint), QUESTION, max_new_tokens=1) is not None


def test_train_takes_a_mapping_and_keys_in_its_place(face, tmp_path) -> None:
    config = yaml.safe_load(run_config(tmp_path, debug=True).to_yaml())
    config |= {"train_path": None, "generate": {"items": 16, "nodes": 16}}
    run = face.train(config, num_epochs=1, name="ünï", **{"generate.items": 8, "lr": 1e-05})
    assert run.directory == tmp_path / "runs/ünï" and run.checkpoint is None
    resolved = (run.directory / "config.yaml").read_text(encoding="utf-8")
    assert "lr: 1.0e-05" in resolved and "items: 8\n" in resolved and "nodes: 16" in resolved
    assert config["generate"] == {"items": 16, "nodes": 16}


def test_what_one_thread_opens_another_can_use(face, folder) -> None:
    items = json.loads((folder / "items.json").read_text())[:1]
    found: list = []

    def use(model) -> list:
        thoughts = face.think(model, QUESTION, max_new_tokens=2)
        summary = face.evaluate(model, items, max_new_tokens=1)
        answer = face.generate(model, QUESTION, max_new_tokens=4)
        return [answer, thoughts.answers, thoughts.vectors.tolist(), summary["accuracy"]]

    def elsewhere(model=None) -> None:
        model = model or face.load(folder / "thinks")
        found.append((model, use(model)))

    here = face.load(folder / "thinks")
    for thread in (threading.Thread(target=elsewhere, args=given) for given in ((here,), ())):
        thread.start()
        thread.join()
    (_, first), (other, second) = found
    assert first == second == use(here) == use(other)


# ---- the page and the notebook


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A directory like one that `init` begins, and the one that commands run in."""
    shutil.copytree(REPOSITORY / "args", tmp_path / "args")
    (tmp_path / "data").mkdir()
    shutil.copy(REPOSITORY / "data/prosqa_tiny.json", tmp_path / "data")
    items = json.loads((tmp_path / "data/prosqa_tiny.json").read_text())[:2]
    (tmp_path / "data/prosqa_tiny.json").write_text(json.dumps(items))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_blocks_of_the_page_run_from_top_to_bottom(face, desk, capsys) -> None:
    page = (REPOSITORY / "docs/python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    names: dict = {}
    printed = []
    for block in blocks:
        exec(block.replace("mlx_coconut", face.__name__), names)
        printed.append(capsys.readouterr().out)
    assert len(list(filter(None, blocks[0].splitlines()))) == 4
    assert f"It prints `{printed[0].strip()}`" in page
    assert printed[1] == "arguments: latents: must be at least 0, got -1\n"
    assert printed[3] == f"{names['thoughts']!r}\n" and printed[3].startswith("2 thoughts\n")
    assert names["lengths"].shape == (2,) and len(names["certainty"]) == 3
    assert names["run"].checkpoint.exists()


def test_the_notebook_runs_from_top_to_bottom(face, desk, capsys) -> None:
    path = REPOSITORY / "docs/python.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    names: dict = {}
    for cell in code:
        exec("".join(cell["source"]).replace("mlx_coconut", face.__name__), names)
    table, counted = capsys.readouterr().out.splitlines()[:7], names["found"]
    assert [line.endswith("Max is a boompus.") for line in table] == [False] * 2 + [True] * 5
    assert counted["n"] == 2 and counted["both_accuracy"] == 1
