"""The table of verbs: one row is all that a verb needs, in both twins and both spellings."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHOSEN, TWINS, few

from coconut import __version__
from coconut.commands import verbs
from coconut.commands.verbs import VERBS

ROOT = Path(__file__).parents[2]


def run(twin: str, *argv: str) -> None:
    importlib.import_module(f"{TWINS[twin]}.__main__").main(argv)


def ended(capsys, twin: str, *argv: str) -> tuple[int | str | None, str, str]:
    """(status, stdout, stderr) of a command that ends by itself."""
    with pytest.raises(SystemExit) as stop:
        run(twin, *argv)
    return stop.value.code, *capsys.readouterr()


def test_the_verbs_are_those_of_the_documents() -> None:
    assert list(VERBS) == (
        "run generate chat serve inspect analyse report convert fuse publish init mac-check".split()
    )


@pytest.mark.parametrize("verb", VERBS)
def test_a_verbs_main_takes_what_its_row_gives(verb: str) -> None:
    row = VERBS[verb]
    takes = inspect.signature(importlib.import_module(row.module).main).parameters
    assert {*row.given.split(), "argv"} == set(takes) - {"prog"}


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_tells_its_arguments_by_its_own_name(capsys, name: str, verb: str) -> None:
    status, out, err = ended(capsys, name, verb, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: {name}-coconut {verb} ")


@pytest.mark.parametrize("name", CHOSEN)
def test_help_lists_every_verb_with_a_line(capsys, name: str) -> None:
    status, out, _ = ended(capsys, name, "--help")
    assert status == 0 and out.startswith(f"usage: {name}-coconut ")
    for verb, row in VERBS.items():
        assert re.search(rf"^  {verb} +{re.escape(row.help)}$", out, re.M)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["genrate", "--model", "x"], "no verb 'genrate'; did you mean generate?"),
        (["qqq"], "no verb 'qqq'; there are run, generate, "),
        ([], "required: VERB"),
        (["--mode"], "required: VERB"),
    ],
)
def test_a_wrong_verb_ends_with_status_2(capsys, argv: list[str], message: str) -> None:
    status, out, err = ended(capsys, CHOSEN[0], *argv)
    assert (status, out) == (2, "") and message in err


@pytest.mark.parametrize("name", CHOSEN)
def test_the_version_is_told(capsys, name: str) -> None:
    status, out, err = ended(capsys, name, "--version")
    assert (status, out, err) == (0, f"{name}-coconut {__version__}\n", "")


@pytest.mark.parametrize("name", CHOSEN)
def test_help_opens_no_framework_and_no_verb(name: str) -> None:
    code = (
        f"import sys; from {TWINS[name]}.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "found = {'torch', 'mlx.core', 'transformers', 'numpy', 'coconut.commands.generate'}\n"
        "print(found & sys.modules.keys(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "set()\n")


@pytest.mark.parametrize("name", few(CHOSEN, 1))
@pytest.mark.parametrize(
    "spelling", [["-m", "{}", "run"], ["-m", "{}.run"], ["{}/run.py"]], ids=["verb", "run", "file"]
)
def test_a_run_starts_by_each_of_its_spellings(name: str, spelling: list[str]) -> None:
    command = [part.format(TWINS[name]) for part in spelling]
    argv = [sys.executable, *command, "args/tiny_coconut.yaml", "--check"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{TWINS[name]} | ")


@pytest.mark.parametrize("name", CHOSEN)
def test_a_framework_that_is_not_installed_is_named_with_its_extra(name: str) -> None:
    library = {"mlx": "mlx", "cuda": "torch"}[name]
    code = (
        f"import sys; sys.modules['{library}'] = None\n"
        f"from {TWINS[name]}.__main__ import main\n"
        "main(['generate', '--model', 'prosqa', '--prompt', 'Who?'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    *_, last = done.stderr.splitlines()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert last == f"{name}-coconut: needs {library}: pip install 'mlx-coconut[{name}]'"


def test_ctrl_c_while_a_verb_is_imported_is_no_traceback(monkeypatch, capsys):
    def stopped(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(verbs.importlib, "import_module", stopped)
    with pytest.raises(SystemExit) as end:
        verbs.main("mlx_coconut", None, None, ["run", "x.yaml"])
    assert end.value.code == 130 and capsys.readouterr().err == ""
