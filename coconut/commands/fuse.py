"""`mlx-coconut fuse DIR OUT`: an adapter and its base -> a whole checkpoint."""

import argparse
import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from coconut.backend import MakeBackend
from coconut.checkpoints.adapter_files import is_adapter
from coconut.checkpoints.checkpoint import COCONUT, describe, write_atomically
from coconut.checkpoints.named import checkpoint_config
from coconut.checkpoints.source import open_source
from coconut.errors import UserError, guarded, options_of


def main(twin: str, make_backend: MakeBackend, argv: Sequence[str] | None = None) -> None:
    """Write OUT; what the user can mend ends with one message and status 2."""
    parser = options_of(
        twin, "fuse", "Make a whole float checkpoint of one that holds an adapter, or is quantised."
    )
    parser.add_argument("source", metavar="DIR", type=Path, help="checkpoint with an adapter")
    parser.add_argument("target", metavar="OUT", type=Path, help="new directory")
    parser.add_argument("--base", metavar="DIR", help="where the base is now, if it was moved")
    parser.add_argument(
        "--base-only",
        action="store_true",
        help="the base as the adapter needs it, with rows for new tokens, for other programs:"
        " mlx_lm.load(OUT, adapter_path=DIR)",
    )
    options = parser.parse_args(argv)
    guarded(lambda: fuse(make_backend, options))


def fuse(make_backend: MakeBackend, options: argparse.Namespace) -> None:
    """Open the checkpoint, fuse, and write OUT whole or not at all."""
    source, target = options.source, options.target
    if target.exists():
        raise UserError(str(target), "is there already; name a new directory")
    config = checkpoint_config(source)
    if not is_adapter(source) and not describe(source)["config"].get("quantization"):
        raise UserError(str(source), "holds neither an adapter nor quantised weights")
    config.model_id = options.base
    opened = open_source(config)
    backend = make_backend(config, opened.source)
    aside = backend.without_adapters() if options.base_only else contextlib.nullcontext()
    with write_atomically(target) as partial, aside:
        backend.save_fused(partial)
        opened.tokenizer.save(partial)
        if (source / COCONUT).exists() and not options.base_only:
            shutil.copy(source / COCONUT, partial / COCONUT)
    print(f"wrote {target}: {describe(target)['bytes'] / 1e6:,.1f} MB")
