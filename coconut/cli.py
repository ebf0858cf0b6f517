"""The command line of both twins: arguments, --check, exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from coconut.config import keys_table, load_config
from coconut.errors import UserError

if TYPE_CHECKING:
    from coconut.runner import MakeBackend


def main(twin: str, make_backend: MakeBackend, argv: Sequence[str] | None = None) -> None:
    """Run `python -m TWIN.run`; what the user can mend ends with one message and status 2."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {twin}.run",
        description="Train or evaluate one run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="keys:\n" + "\n".join(f"  {k} ({t}, {d}): {h}" for k, t, d, h in keys_table()),
    )
    parser.add_argument("args", metavar="ARGS.yaml", help="the run's configuration")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace single keys")
    parser.add_argument("--check", action="store_true", help="check everything, print the plan")
    options = parser.parse_intermixed_args(argv)

    def run() -> None:
        config = load_config(options.args, options.overrides)
        if options.check:
            from coconut.plan import print_plan

            print_plan(config, twin)
            return
        from coconut.runner import Runner

        runner = Runner(config, make_backend, twin)
        if config.only_eval:
            runner.evaluate_once()
        else:
            runner.train()

    guarded(run)


def guarded(run: Callable[[], None]) -> None:
    """Call `run`; a UserError becomes its message on stderr and exit status 2."""
    try:
        run()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; Python's own flush at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)
