"""The command line of both twins: arguments, --check, exit codes."""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from coconut.backend import Backend
from coconut.config.keys import RunConfig
from coconut.config.latro_keys import LatroConfig
from coconut.config.methods import DATASET_METHODS
from coconut.config.reading import from_options, load_config
from coconut.config.reference import help_text
from coconut.errors import UserError, guarded, options_of
from coconut.lock import held
from coconut.plan.memory import gpu_memory
from coconut.reporting.console import silenced
from coconut.tasks import official
from coconut.world import World, together


def main(
    twin: str,
    make_backend: Callable[..., Backend],
    argv: Sequence[str] | None = None,
    make_world: Callable[[], World] = World,
) -> None:
    """Train or evaluate one run; what the user can mend ends with one message and status 2.

    make_world: the processes that a launcher started with this one.
    """
    parser = options_of(twin, "run", "Train or evaluate one run.", help_text())
    parser.add_argument("args", metavar="ARGS.yaml", help="the run's configuration")
    replace = "replace single keys; --key value does the same"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=replace)
    parser.add_argument("--check", action="store_true", help="check everything, print the plan")
    words = sys.argv[1:] if argv is None else argv
    options = parser.parse_intermixed_args(from_options(words, ("--check", "--help")))

    started: list[Path] = []

    def run(world: World) -> None:
        config = load_config(options.args, options.overrides)
        if options.check:
            _check(config, twin, world)
        else:
            started.append(config.run_dir)
            start_run(config, make_backend, twin, world)

    def stopped() -> str:
        if not started or newest_of(started[0]) is None:
            return "stopped before the first checkpoint; the same command starts anew"
        return "stopped; the same command continues from the last checkpoint"

    guarded(lambda: together(run, make_world), stopped)


def newest_of(directory: Path) -> Path | None:
    """The newest checkpoint of a run of any method; None if none was saved."""
    from coconut.run.latro.resume import checkpoints
    from coconut.run.saving import newest_checkpoint

    return newest_checkpoint(directory) or next(iter(checkpoints(directory)[::-1]), None)


def _check(config: RunConfig, twin: str, world: World) -> None:
    """Print the plan of a run."""
    _refuse(config, twin, world.size, only_check=True)
    if world.is_first:
        _plan(config, twin, world.size)
    world.wait()


def _plan(config: RunConfig, twin: str, n: int) -> list[str]:
    """Print the plan. Returns what was said of batches that this machine has no room for."""
    from coconut.plan.latro_plan import print_latro_plan
    from coconut.plan.plan import print_plan

    if isinstance(config, LatroConfig) and not config.only_eval:
        return print_latro_plan(config, twin, n)
    return print_plan(config, twin, n)


def start_run(
    config: RunConfig, make_backend: Callable[..., Backend], twin: str, world: World
) -> None:
    """Do the run that a configuration asks for; what it finds is in its directory.

    make_backend: told the processes (`world`) too. Raises UserError for what does not fit.
    """
    _refuse(config, twin, world.size)
    if world.is_first and gpu_memory() is not None:
        with silenced():
            large = _plan(config, twin, world.size)
        for line in large:
            print(line, file=sys.stderr)
    with held(config.run_dir) if world.is_first else nullcontext():
        world.wait()  # the others hear of a directory that is taken
        _start(config, make_backend, twin, world)


def _start(
    config: RunConfig, make_backend: Callable[..., Backend], twin: str, world: World
) -> None:
    given = (config, partial(make_backend, world=world), twin, world)
    if isinstance(config, LatroConfig) and config.method == "preexperiment":
        from coconut.run.latro.preexperiment import measure

        measure(config, *given[1:])
    elif config.method in DATASET_METHODS and config.only_eval:
        from coconut.run.answering import evaluate_data_set

        evaluate_data_set(*given)
    elif isinstance(config, LatroConfig):
        from coconut.run.latro.loop import LatroRunner

        LatroRunner(config, *given[1:]).train()
    elif config.method in DATASET_METHODS:
        from coconut.run.sft_loop import SftRunner

        SftRunner(*given).train()
    else:
        from coconut.run.curriculum_loop import Runner

        runner = Runner(*given)
        if config.only_eval:
            runner.evaluate_once()
        else:
            runner.train()


def _refuse(config: RunConfig, twin: str, n: int, only_check: bool = False) -> None:
    """Raise UserError for what is wrong with running in n processes, or the keys about them.

    Also for official data that is not there, before a model is fetched; a check goes on without.
    """
    reads_train = not config.only_eval and not config.generate
    for path in (config.val_path, config.train_path if reads_train else None):
        if not only_check and official.absent(path):
            raise UserError(str(path), f"no such file; `{official.HOW}` fetches it")
    if config.shard and twin == "mlx_coconut":
        problem = "MLX has no sharding of weights; train with cuda_coconut, or set shard: False"
    elif config.shard and n == 1 and not only_check:
        problem = (
            "one process has nobody to share with; start several with torchrun"
            " --nproc_per_node N -m cuda_coconut.run ..., or set shard: False"
        )
    else:
        return
    raise UserError(config.where, f"shard: {problem}")
