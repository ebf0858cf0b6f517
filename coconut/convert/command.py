"""`mlx-coconut convert SRC [DST]`: a checkpoint of any known layout to one that both twins open."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from coconut.convert.adapters import convert_adapter
from coconut.convert.keymap import TWINS
from coconut.convert.read import read
from coconut.convert.verify import compare
from coconut.convert.write import NO_TOKENIZER, Facts, write_directory, write_official
from coconut.errors import guarded, typed

LAYOUTS = """\
SRC is recognised by itself:
  a file       official Coconut or CoT state dict (torch), the MLX port's safetensors
  a directory  Hugging Face GPT-2 or Qwen2 (safetensors or pytorch_model.bin, sharded too),
               the fork's folder, a checkpoint of ours (copied whole, so that a run goes on)
Numbers are kept as they are, bfloat16 too; the twins compute with float32 copies.
"""


def main(twin: str, argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Convert SRC to DST for a twin; what the user can mend ends with one message and status 2.

    prog: how the command was typed, if not as the verb. Only the torch twin offers --official.
    """
    [framework] = [name for name, package in TWINS.items() if package == twin]
    parser = argparse.ArgumentParser(
        prog=prog or typed(twin, "convert"),
        description="Convert a checkpoint to a directory that both twins open as it is.",
        epilog=LAYOUTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SRC", type=Path, help="checkpoint file or directory")
    add("target", metavar="DST", type=Path, nargs="?", help=f"default: SRC-{framework}")
    add("--config", type=Path, help="config.json of a bare state dict (default: from shapes)")
    add("--tokenizer", help=f"gpt2, prosqa, a directory, or {NO_TOKENIZER} (default: SRC's, gpt2)")
    add("--latent-ids", type=_three_ids, metavar="S,E,L", help="ids of start, end and latent")
    add("--stage", type=_count, help="stage the model was trained to (default: beyond the last)")
    add("--c-thought", type=_count, help="latents a step (default: 1)")
    add("--max-latent-stage", type=_count, help="last stage that adds latents (default: 6)")
    add("--weights-only", action="store_true", help="leave out moments and trainer state")
    other = parser.add_mutually_exclusive_group()
    if framework == "torch":
        other.add_argument(
            "--official", type=Path, metavar="FILE", help="write the published state dict instead"
        )
    other.add_argument("--adapter", action="store_true", help="ours to peft, others to ours")
    other.add_argument("--verify", action="store_true", help="compare the logits of SRC and DST")
    add("--base", metavar="DIR", help="with --adapter: the model it was trained beside")
    options = parser.parse_args(argv)
    facts = Facts(
        options.tokenizer,
        options.latent_ids,
        options.stage,
        options.c_thought,
        options.max_latent_stage,
    )
    source, official = options.source, getattr(options, "official", None)
    if official is not None and (options.target is not None or facts.given()):
        parser.error("--official takes neither DST nor facts about the tokenizer and the stages")
    has_no_facts = options.adapter or options.verify
    if has_no_facts and (options.target is None or facts.given() or options.weights_only):
        parser.error("--adapter and --verify need SRC and DST, and take no facts about a model")
    if (options.base and not options.adapter) or (options.config and options.adapter):
        parser.error("--base goes with --adapter alone, which takes no --config")
    target = options.target or Path(f"{str(source).rstrip('/')}-{framework}")

    def run() -> None:
        if options.adapter:
            convert_adapter(source, target, options.base)
        elif options.verify:
            if not compare(source, target, options.config):
                sys.exit(1)
        else:
            _convert(options, facts, target, official)

    guarded(run)


def _convert(
    options: argparse.Namespace, facts: Facts, target: Path, official: Path | None
) -> None:
    """Read SRC, write it to `target` or as an `official` file, and say what became of it."""
    found = read(options.source, options.config)
    print(f"{options.source}: {found.summary()}")
    for note in found.notes:
        print(f"  {note}")
    if official is not None:
        notes = write_official(found, official)
    else:
        notes = write_directory(found, target, facts, options.weights_only)
    for note in notes:
        print(f"  {note}")
    print(f"wrote {official or target}: {len(found.tensors)} tensors")


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def _three_ids(text: str) -> list[int]:
    ids = [_count(part) for part in text.split(",")]
    if len(ids) != 3:
        raise ValueError
    return ids


_count.__name__, _three_ids.__name__ = "whole number", "list of three ids"  # argparse shows them
