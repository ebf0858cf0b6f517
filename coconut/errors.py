"""The one exception for input that the user can mend, and how a command begins and ends."""

import argparse
import difflib
import errno
import os
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


def of_disk(error: OSError) -> UserError:
    """What to say of a disk that refuses, wherever it was met; any other error is raised again."""
    if error.errno not in DISK:
        raise error
    if error.filename is None:
        # It may have been stdout, whose rest Python would try to write once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return UserError(str(error.filename or "a file"), f"the disk refuses: {error.strerror}")


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


def guarded(
    run: Callable[[], None],
    stopped: str = "stopped; the same command continues from the last checkpoint",
) -> None:
    """Call `run`; a UserError becomes its message on stderr and exit status 2.

    stopped: what to say if the user stops it; the status is then 130.
    """
    try:
        run()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(of_disk(error), file=sys.stderr)
            sys.exit(2)
        # The reader (`| head`) has seen enough; Python's own flush at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
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
