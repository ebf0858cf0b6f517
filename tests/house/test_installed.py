"""What a user gets who installs this: its lists agree, and the built wheel works elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from coconut import __version__
from coconut.files import shipped_names

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
NOT_PACKED = shutil.ignore_patterns(
    *(".*", "__pycache__", "build", "*.egg-info", "runs", "cache", "tests", "bench", "*_train.json")
)
QUESTION = (
    "Every lempus is a jompus. Tom is a lempus. Every rempus is a zumpus. Sam is a rempus."
    " Is Tom a jompus or zumpus?"
)
RIGHT = "### Tom is a jompus.\n"


def listed(name: str) -> list[Requirement]:
    """The requirements that a file lists."""
    lines = (line.partition(" #")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


# ---- the lists


def test_the_requirements_of_a_checkout_are_those_of_the_package_and_both_twins() -> None:
    wanted = [*PROJECT["dependencies"], *EXTRAS["mlx"], *EXTRAS["cuda"]]
    assert sorted(map(str, listed("requirements.txt"))) == sorted(
        str(Requirement(w)) for w in wanted
    )


def test_every_requirement_has_one_tested_version_within_its_range() -> None:
    exact = {r.name.lower(): str(r.specifier) for r in listed("constraints.txt")}
    asked = [
        *PROJECT["dependencies"],
        *(w for name in ("mlx", "cuda", "dev") for w in EXTRAS[name]),
    ]
    for wanted in map(Requirement, asked):
        version = exact[wanted.name.lower()].removeprefix("==")
        assert wanted.specifier.contains(version), wanted
    assert {Requirement(wanted).name.lower() for wanted in asked} == set(exact)


def test_one_list_says_which_pythons_are_supported() -> None:
    named = re.findall(r"Python :: (\d\.\d+)$", "\n".join(PROJECT["classifiers"]), re.M)
    assert ".".join(map(str, sys.version_info[:2])) in named
    before = f"3.{int(named[0].removeprefix('3.')) - 1}"
    spec = SpecifierSet(PROJECT["requires-python"])
    assert all(version in spec for version in named) and before not in spec
    told = subprocess.run(["make", "-pn", "lint"], cwd=ROOT, capture_output=True, text=True).stdout
    assert re.findall(r"^SUPPORTED := (.*)$", told, re.M) == [" ".join(named)]


# ---- without torch


@pytest.mark.slow
def test_all_of_mlx_and_the_conversion_of_safetensors_work_without_torch(tmp_path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from mlx_coconut.__main__ import main\n"
        f"main(['generate', '--model', 'prosqa', '--prompt', {QUESTION!r}])\n"
        "main(['convert', 'data/checkpoints/prosqa', sys.argv[1] + '/copy'])\n"
        "main(['run', 'args/tiny_coconut.yaml', 'num_epochs=1', 'generate.items=8',\n"
        "      'batch_size_training=8', 'val_path=data/prosqa_tiny.json', 'max_new_tokens=1',\n"
        "      'report=False', 'save_path=' + sys.argv[1]])\n"
        "from cuda_coconut.__main__ import main\n"
        "main(['convert', 'data/checkpoints/prosqa', sys.argv[1] + '/torch'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(RIGHT)
    written = {path.parent.name for path in tmp_path.rglob("model.safetensors")}
    assert written == {"copy", "torch", "epoch_01"}


# ---- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel built from the source distribution of a copy of this checkout."""
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT, folder / "checkout", ignore=NOT_PACKED)
    # Made by a user beside the data that ships: nobody else's.
    (folder / "checkout/data/mine_valid.json").write_text("[]")
    code = "from setuptools import build_meta; build_meta.build_sdist('..')"
    run([sys.executable, "-c", code], folder / "checkout")
    [packed] = folder.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    source = folder / packed.name.removesuffix(".tar.gz")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    run([sys.executable, "-m", "pip", "wheel", "-q", *options, str(source)], folder)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory) -> Iterator[Path]:
    """The programs of an environment that has the wheel, over what the tests run with."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    paths = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", paths))
    (packages / "tested.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(folder / "bin" / "python")
    options = ["--no-deps", "--no-index", "--ignore-installed", "--no-compile"]
    run([python, "-m", "pip", "install", "-q", *options, str(wheel)], folder)
    yield folder / "bin"


def run(command: list[str | Path], folder: Path) -> str:
    """What a command prints that ends well, in a folder, with nothing of this checkout in sight."""
    environment = {
        n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "COVERAGE_PROCESS")
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A user's own folder, whose files bear names that the checkout has too."""
    for name in ("data.py", "convert.py"):
        (tmp_path / name).write_text("raise SystemExit('a file of the user was imported')")
    return tmp_path


@pytest.mark.slow
def test_a_wheel_holds_the_three_packages_and_each_file_that_ships_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"coconut", "mlx_coconut", "cuda_coconut"}
    start = "coconut/shipped/"
    assert sorted(n.removeprefix(start) for n in names if n.startswith(start)) == (
        shipped_names(ROOT)
    )
    packed = {n for n in names if n.split("/")[0] in tops and not n.startswith(start)}
    here = {
        path.relative_to(ROOT).as_posix()
        for top in tops
        for path in (ROOT / top).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert packed == here


@pytest.mark.slow
def test_the_installed_commands_work_in_a_folder_with_files_of_the_same_names(
    installed: Path, elsewhere: Path
) -> None:
    for command in (["mlx-coconut"], ["cuda-coconut"], ["python", "-m", "mlx_coconut"]):
        told = run([installed / command[0], *command[1:], "--version"], elsewhere)
        assert re.fullmatch(rf"(mlx|cuda)-coconut {re.escape(__version__)}\n", told)
    where = run([installed / "python", "-c", "import coconut; print(coconut.__file__)"], elsewhere)
    assert where.startswith(str(installed.parent))
    asked = ["generate", "--model", "prosqa", "--prompt", QUESTION]
    assert run([installed / "mlx-coconut", *asked], elsewhere) == RIGHT


@pytest.mark.slow
def test_the_installed_init_begins_a_directory_whose_run_can_start(
    installed: Path, elsewhere: Path
) -> None:
    said = run([installed / "mlx-coconut", "init", "x"], elsewhere)
    [pages] = re.findall(r"^pages to read: (.*)$", said, re.M)
    assert (Path(pages) / "README.md").is_file() and pages.startswith(str(installed.parent))
    planned = run(
        [installed / "mlx-coconut", "run", "args/tiny_coconut.yaml", "--check"], elsewhere / "x"
    )
    assert planned.startswith("mlx_coconut | ")


@pytest.mark.slow
def test_the_installed_package_is_used_from_python(installed: Path, elsewhere: Path) -> None:
    (elsewhere / "script.py").write_text(
        "import sys\n"
        "from mlx_coconut import generate, load, think\n"
        "model = load('prosqa')\n"
        "print(generate(model, [sys.argv[1]], latents=6)[0])\n"
        "print(len(think(model, sys.argv[1])._repr_html_()) > 100_000)\n"
    )
    assert run([installed / "python", "script.py", QUESTION], elsewhere) == f"{RIGHT}True\n"
