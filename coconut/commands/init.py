"""`mlx-coconut init DIR`: a directory to start from, with every run and the data that ships."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from coconut.errors import UserError, guarded, options_of, typed
from coconut.files import hidden, shipped, shipped_names

COPIED = ("args/", "data/")


def main(twin: str, argv: Sequence[str] | None = None) -> None:
    """Make DIR; what the user can mend ends with one message and status 2."""
    parser = options_of(twin, "init", "Begin a directory with runs and small data sets.")
    parser.add_argument("directory", metavar="DIR", type=Path, help="new directory")
    options = parser.parse_args(argv)
    guarded(lambda: init(twin, options.directory), "stopped; nothing half-written is left")


def init(twin: str, target: Path) -> None:
    """Copy runs and data to a new directory, whole or not at all, and say what to do there."""
    if target.exists() or target.is_symlink():
        raise UserError(str(target), "is there already; name a new directory")
    root, partial = shipped(""), hidden(target, "partial")
    names = [name for name in shipped_names(root) if name.startswith(COPIED)]
    try:
        for name in names:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, partial / name)
        partial.rename(target)
    except OSError as error:
        raise UserError(str(target), f"cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    n_runs = sum(name.endswith(".yaml") for name in names)
    run, chat = f"{typed(twin, 'run')} args/tiny_coconut.yaml", typed(twin, "chat")
    print(f"wrote {target}: {n_runs} runs in args/, what they read in data/; now")
    print(f"  cd {target}")
    print(f"  {run} --check   # what it will do")
    print(f"  {run}           # trains a tiny model in minutes")
    print(f"  {chat} --model prosqa                  # asks one that is trained")
    print(f"pages to read: {shipped('docs')}")
