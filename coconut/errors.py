"""The one exception for input that the user can mend, and how a command begins and ends."""

import argparse
import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any


class UserError(Exception):
    """Bad input: configuration, data, checkpoint or text.

    where: the file (and item) the problems lie in. problems: one line each, saying what is wrong
    and what to do. The command line prints the message without a traceback and exits with status 2.
    """

    def __init__(self, where: str, *problems: str) -> None:
        self.where = where
        self.problems = problems
        if len(problems) == 1:
            message = f"{where}: {problems[0]}"
        else:
            message = "\n  ".join([f"{where}: {len(problems)} problems", *problems])
        super().__init__(message)


DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE}
DISK |= {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES}


def of_disk(error: OSError) -> UserError:
    """What to say of a disk that refuses, wherever it was met; any other error is raised again."""
    if error.errno not in DISK:
        raise error
    if error.filename is None:
        # It may have been stdout, whose rest Python would try to write once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return UserError(shown(str(error.filename or "a file")), f"the disk refuses: {error.strerror}")


def nearest(name: Any, known: Iterable[str], before: str = "") -> str:
    """`before`, and a question whether one of the known names was meant; "" if none is near."""
    near = difflib.get_close_matches(name, known, 1) if isinstance(name, str) else []
    return f"{before}did you mean {near[0]}?" if near else ""


def shown(name: object) -> str:
    """A name from a foreign file, safe to print in one line."""
    text = name if isinstance(name, str) and name.isprintable() else ascii(name)
    return text if len(text) <= 80 else text[:77] + "..."


def some(lines: Iterable[str], most: int = 8) -> list[str]:
    """The first of many lines, and how many more there are."""
    lines = list(lines)
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more"]


MACHINE = {
    "Impacting Interactivity": "macOS stopped a step that kept the GPU from drawing the screen;"
    " a smaller batch_size_training (with more gradient_accumulation_steps: the same update) or"
    " eval_batch_size makes steps shorter",
    "Insufficient Memory|out of memory|not enough memory|can't allocate memory"
    "|Unable to allocate|Attempting to allocate": "out of memory: a smaller batch_size_training"
    " (with more gradient_accumulation_steps: the same update), gradient_checkpointing: True, or a"
    " smaller eval_batch_size takes less; --check estimates it",
    "Cache thrashing": "MLX-CUDA keeps too few graphs for so many shapes; set"
    " MLX_CUDA_GRAPH_CACHE_SIZE=2000 in the environment",
    "No Metal device|Metal GPU|no default Metal": "MLX finds no GPU that it can use: it needs"
    " macOS 14 or newer on Apple silicon and an arm64 Python; device: cpu computes without one",
}
"""What the libraries say when the machine is at fault, and the way out."""


def machine_trouble(error: BaseException) -> str | None:
    """The way out of an error that the machine, not the code, is the cause of; None of another."""
    text = f"{type(error).__name__}: {error}"
    for said, way_out in MACHINE.items():
        if re.search(said, text, re.IGNORECASE):
            return way_out
    return "out of memory" if isinstance(error, MemoryError) else None


def guarded(
    run: Callable[[], None],
    stopped: Callable[[], str] | str = "stopped",
) -> None:
    """Call `run`; a UserError, or a machine at its limits, is a line on stderr and exit status 2.

    stopped: what to say if the user stops it; the status is then 130.
    """
    try:
        run()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if (way_out := machine_trouble(error)) is None:
            raise
        what = str(error) or type(error).__name__
        print(f"{way_out} ({what.splitlines()[0][:200]})", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(of_disk(error), file=sys.stderr)
            sys.exit(2)
        # The reader (`| head`) has seen enough; Python's own flush at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print(stopped if isinstance(stopped, str) else stopped(), file=sys.stderr)
        sys.exit(130)


def options_of(twin: str, verb: str, about: str, below: str = "") -> argparse.ArgumentParser:
    """The parser of a verb's options, none yet. below: what its help ends with, line by line."""
    as_written = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        prog=typed(twin, verb), description=about, epilog=below, formatter_class=as_written
    )


def typed(twin: str, verb: str) -> str:
    """How a user types a verb of a twin: `mlx-coconut generate`."""
    return f"{twin.replace('_', '-')} {verb}"
