"""The verbs of `mlx-coconut` and `cuda-coconut`, in one table."""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from coconut import __version__
from coconut.errors import nearest


class Verb(NamedTuple):
    """One verb: the module that is imported to run it, what its `main` is given, what it does."""

    module: str
    given: str
    help: str


VERBS = {
    "run": Verb("coconut.commands.run", "twin make_backend make_world", "train or evaluate a run"),
    "generate": Verb("coconut.commands.generate", "twin make_backend", "answer questions"),
    "chat": Verb("coconut.inside.chat", "twin make_backend", "ask question after question"),
    "serve": Verb("coconut.inside.page.serve", "twin make_backend", "show thoughts on a live page"),
    "inspect": Verb("coconut.inside.inspect", "twin make_backend", "see inside a thought"),
    "analyse": Verb("coconut.inside.analyse", "twin make_backend", "measure a data set's thoughts"),
    "report": Verb("coconut.reporting.report", "twin", "draw the curves of runs, side by side"),
    "convert": Verb("coconut.convert.command", "twin", "bring a checkpoint to another layout"),
    "fuse": Verb("coconut.commands.fuse", "twin make_backend", "join an adapter and its base"),
    "publish": Verb("coconut.commands.publish", "twin", "upload a checkpoint with a model card"),
    "init": Verb("coconut.commands.init", "twin", "begin a directory with runs and data"),
    "mac-check": Verb(
        "coconut.commands.mac_check", "twin make_backend", "check MLX on this machine"
    ),
}

PROJECT = "mlx-coconut"
EXTRAS = {"mlx": "mlx", "mlx_lm": "mlx", "torch": "cuda", "peft": "cuda"}
"""Library that a twin cannot do without -> the extra of the project that installs it."""


def main(
    twin: str,
    make_backend: Callable[..., Any],
    make_world: Callable[..., Any],
    argv: Sequence[str] | None = None,
) -> None:
    """Run `mlx-coconut VERB ...`, or the same of the other twin; a wrong verb ends with status 2.

    twin: package of the twin. make_backend, make_world: its own, for the verbs that need them.
    """
    command, argv = twin.replace("_", "-"), sys.argv[1:] if argv is None else argv
    if argv and argv[0] in VERBS:
        verb = VERBS[argv[0]]
        known = {"twin": twin, "make_backend": make_backend, "make_world": make_world}
        given = {name: known[name] for name in verb.given.split()}
        try:
            importlib.import_module(verb.module).main(**given, argv=argv[1:])
        except ModuleNotFoundError as error:
            library = str(error.name).partition(".")[0]
            if library not in EXTRAS:
                raise
            what = f"{PROJECT}[{EXTRAS[library]}]"
            print(f"{command}: needs {library}: pip install '{what}'", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:  # while libraries are imported; the verb has its own answer
            sys.exit(130)
        return
    parser = argparse.ArgumentParser(
        prog=command,
        usage=f"{command} [-h] [--version] VERB ...",
        description="Language models that reason in a continuous latent space.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="verbs (VERB --help tells more):\n"
        + "\n".join(f"  {name:9} {verb.help}" for name, verb in VERBS.items()),
    )
    parser.add_argument("--version", action="version", version=f"{command} {__version__}")
    parser.add_argument("verb", metavar="VERB", help="one of those below, then its own arguments")
    wrong = parser.parse_known_args(argv)[0].verb
    hint = nearest(wrong, VERBS) or f"there are {', '.join(VERBS)}"
    parser.error(f"no verb {wrong!r}; {hint}")
