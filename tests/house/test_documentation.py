"""The documentation does what it says: its commands run, its links lead somewhere.

Every shell command of the pages (indented or fenced, or code in a sentence that begins like one) is
looked up in COMMANDS and run in this process, page after page in one directory that holds copies of
args/ and data/. A command that no entry matches fails: add a line to COMMANDS. A block that is no
shell is fenced with its kind (```text, ```yaml, ...). A ```text block behind a command is what it
prints; any other block whose paragraph ends in the name of a file, as code, is that file.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import naive_feedback
import pytest
import test_feedback
from conftest import CHOSEN, TWINS, load_twin

from coconut.feedback import catalogue, transforms

ROOT = Path(__file__).parents[2]
TOUR = "docs/tour.md"
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "data/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]
both_twins = pytest.mark.skipif(set(CHOSEN) != set(TWINS), reason="the pages use both twins")


@dataclass(frozen=True)
class How:
    """What becomes of a command.

    add: arguments behind its own, which they replace. swap: words for its placeholders. check: only
    its plan is made (--check). parse, skip: it is not run, for this reason; its arguments are read,
    or not even that. statuses: how it ends the first time, the second, ...; the last goes on.
    stdin: what is typed. shows: whether the page's ```text block is compared.
    """

    add: str = ""
    swap: dict[str, str] = field(default_factory=dict)
    check: bool = False
    parse: str = ""
    skip: str = ""
    statuses: tuple[int, ...] = (0,)
    stdin: str = ""
    shows: bool = True


# An update an epoch, so that the tour's checkpoints are all there; the shipped run on tiny graphs.
TINY = "generate.items=8 batch_size_training=8 eval_every=24 keep_checkpoints=2 report=False"
TINY_QUESTIONS = "val_path=data/prosqa_tiny.json max_new_tokens=2"
# A tiny model from random weights in the place of the hub's GPT-2, and the last epoch alone.
PROSQA = (
    "model_id=None model_config_path=args/models/tiny_gpt2.json tokenizer=prosqa report=False"
    " generate.items=8 resume=49 batch_size_training=8 gradient_accumulation_steps=1 "
) + f"{TINY_QUESTIONS} resume_changed=True"  # pages follow each other in one directory
ON_DISK = (
    "model_id=data/checkpoints/prosqa train_path=data/prosqa_tiny.json"
    " val_path=data/prosqa_tiny.json resume_changed=True"
)
NETWORK = "needs the network; tests/tasks/test_data_download.py has a server of its own"
RAW = "reads a file that is not here; tests/tasks/test_data_converters.py has small ones"
DATA_SETS = "tests/tasks/test_docs_data_sets.py runs it with the page's files, in both twins"
SLOW = "takes a minute; tests/inside/test_analyse.py runs each on a tiny model"

COMMANDS: dict[str, How] = {
    "git clone *": How(skip="made this directory"),
    "cd mlx-coconut": How(skip="of the shell"),
    "source .venv/bin/activate": How(skip="of the shell"),
    "pip install .[[]*]": How(skip="installs; make setup was run"),
    "pip install -U mlx": How(skip="installs"),
    "pip install mlx[[]cuda12]": How(skip="installs, and needs an NVIDIA GPU"),
    "python3 -m venv .venv": How(skip="made this directory"),
    ". .venv/bin/activate": How(skip="of the shell"),
    "python3 -c import platform; *": How(skip="prints x86_64 or arm64"),
    "PYTHONPATH=. python tests/checkpoints/test_what_is_read.py": How(
        skip="makes the tables again"
    ),
    "mlx-coconut mac-check": How(skip="takes minutes; tests/commands/test_mac_check.py runs parts"),
    "mlx-coconut mac-check --table *": How(swap={"FILE": f"{ROOT}/docs/mac-check-cpu.json"}),
    "make *": How(),
    "TWINS=mlx make test": How(),
    "TIKTOKEN_CACHE_DIR=* make test-all": How(),
    "PICTURE=docs/inspect.png make test-browser": How(),
    "python -m pytest tests/thoughts/test_feedback.py -k times": How(
        skip="test_the_rule_of_the_page_is_held_to_its_oracle does it"
    ),
    "python -m pytest -m gpu": How(skip="skips itself without a GPU"),
    "rm -r runs/tiny-coconut/epoch_24": How(),
    "python -c import os; os.truncate('runs/*": How(),
    # The shipped model.
    "mlx-coconut inspect --model prosqa *": How(),
    "mlx-coconut serve *": How(parse="ends when stopped; tests/inside/test_page.py asks it"),
    "mlx-coconut chat *": How(stdin="/example 5\n/thoughts\n/quit\n"),
    "mlx-coconut generate *": How(shows=False),
    "mlx-coconut init *": How(),
    "python -m bench.story *": How(),
    "python -m mlx_coconut.run args/prosqa_coconut_eval.yaml*": How(
        add=TINY_QUESTIONS, swap={"n_latents=K": "n_latents=2"}
    ),
    "*-coconut analyse *": How(
        swap={"WHAT": "all", "N": "1", "K": "1", "KIND": "answer"}, parse=SLOW
    ),
    # The tiny one.
    "mlx-coconut run args/tiny_coconut.yaml lr=fast *": How(statuses=(2,)),
    "mlx-coconut run args/tiny_coconut.yaml * feedback=zero": How(statuses=(2,)),
    "mlx-coconut run args/tiny_coconut.yaml only_eval=True *": How(),
    "mlx-coconut run args/tiny_*.yaml*--check": How(),
    "mlx-coconut run args/tiny_coconut.yaml": How(add=TINY, statuses=(0, 2, 0)),
    "mlx-coconut run args/tiny_coconut.yaml lr=1e-3 *": How(add="resume_changed=True", check=True),
    "cuda-coconut run args/tiny_hops.yaml *": How(add=TINY),
    "mlx-coconut run args/tiny_coconut.yaml name=tiny-times *": How(
        skip="test_the_rule_of_the_page_is_held_to_its_oracle does it"
    ),
    "cuda-coconut run args/tiny_coconut.yaml * lora.rank=4 *": How(
        add=f"{TINY} num_epochs=2 val_path=data/prosqa_tiny.json"
    ),
    "mlx-coconut fuse *": How(),
    "python -m bench *": How(parse="takes half an hour"),
    "python -m bench.recipe": How(parse="takes half an hour"),
    "mlx-coconut convert --adapter *": How(),
    "mlx-coconut inspect --model runs/*": How(),
    "mlx-coconut report *": How(swap={"runs/tiny-qwen": "runs/tiny-eval"}),
    "mlx-coconut publish runs/* --dry-run": How(),
    "mlx-coconut run args/tiny_latro.yaml*": How(check=True),
    "*-coconut run args/latro_gsm8k.yaml *": How(
        parse="its model and questions are downloads; tests/run/test_latro_runner.py plans such"
    ),
    "python -m coconut.tasks.questions.sums": How(skip=DATA_SETS),
    "python -m coconut.tasks.questions.chains": How(),
    "mlx-coconut run args/sums_*": How(skip=DATA_SETS),
    "mlx-coconut run args/latro_preexperiment_gsm8k.yaml *": How(skip=DATA_SETS),
    "python make_sums.py": How(),
    "mlx-coconut run sums.yaml --check": How(),
    "mlx-coconut run sums.yaml": How(
        add="train_path=sums_valid.json num_epochs=1 report=False max_new_tokens=2"
    ),
    "mlx-coconut run args/gsm_coconut.yaml model_id=* --check": How(
        parse="needs the network; tests/models/test_borrowed.py has tiny ones"
    ),
    # GPT-2 and what is made of it.
    "*-coconut run args/*_coconut.yaml*--check": How(add=ON_DISK),
    "*-coconut run args/prosqa_coconut.yaml": How(add=PROSQA),
    "torchrun * args/tiny_latro.yaml": How(check=True),
    "mlx.launch * args/tiny_latro.yaml": How(check=True),
    "torchrun *": How(
        add=ON_DISK, swap={"N": "2", "ARGS.yaml": "args/prosqa_coconut.yaml"}, check=True
    ),
    "mlx.launch *": How(add=ON_DISK, check=True),
    "python convert/torch_to_mlx.py checkpoint_33 *": How(
        parse="an official file is not here; tests/convert/test_convert.py writes such"
    ),
    "python convert/torch_to_mlx.py runs/*": How(statuses=(0, 2)),
    "python convert/mlx_to_torch.py *": How(),
    "mlx-coconut convert --verify *": How(),
    # Data and keys.
    "python -m coconut.config*": How(),
    "python data/NAME.py": How(skip="a pattern for those below it"),
    "python data/prosqa.py --items *": How(
        swap={"OFFICIAL": "data/prosqa_tiny.json"}, add="--items 2 --out made.json"
    ),
    "python data/hops.py *": How(),
    "python data/prosqa.py --stats *": How(swap={"FILE": "data/prosqa_tiny.json"}),
    "python data/download.py *": How(parse=NETWORK),
    "python data/gsm8k.py *": How(parse=RAW),
    "python data/prontoqa.py *": How(parse=RAW),
    "python data/arc.py *": How(parse=RAW),
}
"""Command, `*` standing for anything -> what becomes of it; the first that matches."""


# ---- pages


@dataclass
class Command:
    """A command of a page, the line it stands in, and what the page says it prints."""

    line: int
    text: str
    shown: list[str]


HEADS = r"(?:\w+=\S+ )?(?:\S*/)?(?:python3?|pip|make|git|torchrun|mlx\.launch|source|rm"
HEADS += r"|(?:mlx|cuda)-coconut)"
IN_A_SENTENCE = re.compile(rf"`({HEADS}\s[^`]+)`")
FILE = re.compile(r"`([\w.-]+\.\w+)`[^`]*$")


def read_page(page: str) -> tuple[list[Command], dict[str, str]]:
    """The commands of a page in their order, and its files with their texts."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    commands: list[Command] = []
    files: dict[str, str] = {}
    prose = [""] * len(lines)
    fence, block, name, in_block = None, [""], "", False
    for i, line in enumerate(lines):
        edge = re.match(r"\s*```(.*)$", line)
        if edge and fence is None:
            fence, block = edge[1].strip() or "sh", []
            named = FILE.search(" ".join(prose[:i]))
            name = named[1] if named else ""
        elif edge:
            if fence == "text" and commands:
                commands[-1].shown += [line for line in block if line.strip()]
            elif fence not in ("text", "sh") and name:
                files[name] = textwrap.dedent("\n".join(block)) + "\n"
            fence = None
        elif fence is not None:
            block.append(line)
            if fence == "sh" and line.strip():
                commands.append(Command(i + 1, line.strip(), []))
        elif line.startswith("    ") and (in_block or not lines[i - 1].strip()):
            in_block = True
            commands.append(Command(i + 1, line.strip(), []))
        else:
            in_block = in_block and not line.strip()
            prose[i] = line
    text = "\n".join(prose)
    for found in IN_A_SENTENCE.finditer(text):
        number = text[: found.start()].count("\n") + 1
        commands.append(Command(number, " ".join(found[1].split()), []))
    commands = [
        Command(command.line, part, command.shown)
        for command in sorted(commands, key=lambda c: c.line)
        for part in command.text.split(" && ")
    ]
    return commands, files


def words(text: str) -> list[str]:
    """A command's words, `python` for any path to it; options in brackets count as given."""
    found = shlex.split(re.sub(r"(?<=\s)\[(.*?)\]", r"\1", text), comments=True)
    found = [word for word in found if word not in ("…", "...")]
    return [re.sub(r"^\S*/python$", "python", word) for word in found]


def entry_of(text: str) -> tuple[str, How]:
    """The entry of COMMANDS for a command."""
    said = " ".join(words(text))
    for pattern, how in COMMANDS.items():
        if fnmatch.fnmatchcase(said, pattern):
            return pattern, how
    raise LookupError(f"no entry of COMMANDS in {Path(__file__).name} matches: {said}")


# ---- running them


class Parsed(BaseException):
    """Raised in place of what comes behind a command's arguments."""


def run(argv: Sequence[str], stdin: str = "", parse_only: bool = False) -> tuple[int, str]:
    """Run a Python command in this process: (status, all it printed)."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # A module that is imported already is run once more.
        warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)
        if parse_only:
            stop_behind_arguments(patch, "parse_args", "parse_intermixed_args")
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        patch.setattr(sys, "path", [*sys.path])
        if argv[0] in ("mlx-coconut", "cuda-coconut"):
            argv = ["python", "-m", argv[0].replace("-", "_"), *argv[1:]]
        assert argv[0] == "python", argv
        target = list(argv[1:])
        patch.setattr(sys, "argv", target[1:] if target[0] == "-m" else target)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                if target[0] == "-c":
                    exec(target[1], {})
                elif target[0] == "-m":
                    runpy.run_module(target[1], run_name="__main__", alter_sys=True)
                else:
                    script = Path(target[0])
                    script = script if script.exists() else ROOT / script
                    runpy.run_path(str(script), run_name="__main__")
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            except Parsed:
                status = 0
    return status, out.getvalue()


def stop_behind_arguments(patch: pytest.MonkeyPatch, *names: str) -> None:
    """Make methods of ArgumentParser raise Parsed, with what they found, once that is right."""

    def stopping(name: str) -> Any:
        original = getattr(argparse.ArgumentParser, name)

        def parse(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
            raise Parsed(original(self, *args, **kwargs))

        return parse

    for name in names:
        patch.setattr(argparse.ArgumentParser, name, stopping(name))


class Desk:
    """The directory the commands run in, and how often each has run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: Counter[str] = Counter()
        for name in ("args", "data"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("cache"))
        (folder / "docs").mkdir()

    def follow(self, page: str) -> list[str]:
        """Do what a page says; what went otherwise."""
        commands, files = read_page(page)
        for name, text in files.items():
            (self.folder / name).write_text(text, encoding="utf-8")
        wrong = []
        for command in commands:
            try:
                problem = self.do(command)
            except (LookupError, ValueError) as error:
                problem = str(error)
            if problem:
                wrong.append(f"{page}:{command.line}: {command.text}\n{problem}")
        return wrong

    def do(self, command: Command) -> str:
        """Run one command as its entry says; what went otherwise, or nothing."""
        pattern, how = entry_of(command.text)
        argv = [how.swap.get(word, word) for word in words(command.text)]
        if how.skip:
            return ""
        if "make" in argv[:2]:
            target = argv[argv.index("make") + 1]
            made = re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
            return "" if made else f"the Makefile has no target {target}"
        if argv[0] == "rm":
            subprocess.run(argv, cwd=self.folder, check=True)
            return ""
        target, argv = (argv[-1], argv[:-2]) if ">" in argv else ("", argv)
        argv = [*argv, *how.add.split(), *(["--check"] if how.check else [])]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            status, printed = run(without_launcher(argv), how.stdin, bool(how.parse))
            if target:
                Path(target).write_text(printed, encoding="utf-8")
        expected = how.statuses[min(self.seen[pattern], len(how.statuses) - 1)]
        self.seen[pattern] += 1
        if status != expected:
            return f"ended with {status}, not {expected}:\n{printed}"
        if how.shows and not how.parse:
            return "\n".join(missing(command.shown, printed, is_exact=status != 0))
        return ""


def without_launcher(argv: list[str]) -> list[str]:
    """The command that a launcher starts, once the launcher has read its own arguments."""
    if argv[0] == "torchrun":
        from torch.distributed.run import parse_args

        options = parse_args(argv[1:])
        assert options.module, argv
        return ["python", "-m", options.training_script, *options.training_script_args]
    if argv[0] == "mlx.launch":
        (script,) = entry_points(group="console_scripts", name=argv[0])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", argv)
            stop_behind_arguments(patch, "parse_known_args")
            with pytest.raises(Parsed) as parsed:
                script.load()()
        _, rest = parsed.value.args[0]
        return rest[rest[0] == "--" :]
    return argv


def missing(shown: list[str], printed: str, is_exact: bool) -> list[str]:
    """Lines that a page shows and that were not printed.

    Numbers, and in a table what the model says, differ in so short a training: a line counts up to
    its first digit or bar. A message is compared whole.
    """
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    found = []
    for line in shown:
        start = (
            " ".join(line.split()) if is_exact else " ".join(re.split(r"[\d|]", line)[0].split())
        )
        if start not in ("", "...") and not any(made.startswith(start) for made in lines):
            found.append(f"the page shows {line!r}, which was not printed:\n{printed}")
    return found


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Desk, list[str]]]:
    """A desk at which somebody has followed the tour, and what went wrong there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("COLUMNS", "200")
        desk = Desk(tmp_path_factory.mktemp("newcomer"))
        yield desk, desk.follow(TOUR)


@both_twins
@pytest.mark.parametrize("page", [TOUR, *(page for page in PAGES if page != TOUR)])
@pytest.mark.slow
def test_the_commands_of_a_page_do_what_it_says(page: str, desk: tuple[Desk, list[str]]) -> None:
    workplace, of_the_tour = desk
    wrong = of_the_tour if page == TOUR else workplace.follow(page)
    assert not wrong, "\n\n".join(wrong)


def test_every_entry_of_the_table_is_used() -> None:
    used = {entry_of(command.text)[0] for page in PAGES for command in read_page(page)[0]}
    assert set(COMMANDS) == used


def test_a_command_that_the_table_does_not_know_is_found(tmp_path: Path, monkeypatch) -> None:
    page = "Do this:\n\n    python -m coconut.nothing\n\nor `make nothing`, and\n\n"
    (tmp_path / "page.md").write_text(page + "```sh\ncurl there\n```\n\n```yaml\na: 1\n```\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "Makefile").write_text("setup:\n")
    for name in ("args", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "desk").mkdir()
    wrong = Desk(tmp_path / "desk").follow("page.md")
    assert [text.split("\n")[0] for text in wrong] == [
        "page.md:3: python -m coconut.nothing",
        "page.md:5: make nothing",
        "page.md:8: curl there",
    ]


# ---- the page on feedback rules


def pieces() -> list[str]:
    """The Python blocks of the page, in its order."""
    text = (ROOT / "docs/own_feedback.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.S)


@both_twins
def test_the_rule_of_the_page_is_held_to_its_oracle(monkeypatch) -> None:
    options, formula, entry, oracle, line = pieces()

    def within(text: str, module: Any) -> dict[str, Any]:
        """The names a text makes in a copy of a module's names."""
        before = dict(vars(module))
        exec(text, made := dict(before))
        return {name: value for name, value in made.items() if before.get(name) is not value}

    for name, added in eval("{" + options + "}", dict(vars(catalogue))).items():
        monkeypatch.setitem(catalogue.TRANSFORMS, name, added)
    for name, added in eval("{" + entry + "}", within(formula, transforms)).items():
        monkeypatch.setitem(transforms.TRANSFORMS, name, added)
    for name, method in within(oracle, naive_feedback).items():
        if callable(method):
            monkeypatch.setattr(naive_feedback.Thinker, name, method, raising=False)
    rule = eval(line)
    assert rule in (ROOT / "docs/own_feedback.md").read_text().split("```")[-1]
    for name in TWINS:
        test_feedback.test_cached_ragged_batches_equal_the_formulas_run_uncached(
            load_twin(name), rule
        )


# ---- links


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, "RESULTS.md", "CHANGELOG.md"])
def test_links_and_images_of_a_page_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        if not there.exists() or (anchor and anchor not in slugs(there)):
            wrong.append(target)
    assert not wrong


def test_a_newcomer_reads_readme_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 1000


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\]\((\w+\.md)", index))
    assert named == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
