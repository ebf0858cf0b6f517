"""The command line of both directions."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from coconut.convert.read import read
from coconut.convert.write import NO_TOKENIZER, Facts, write_directory, write_official
from coconut.errors import guarded

LAYOUTS = """\
SRC is recognised by itself:
  a file       official Coconut or CoT state dict (torch), the MLX port's safetensors
  a directory  Hugging Face GPT-2 or Qwen2 (safetensors or pytorch_model.bin, sharded too),
               the fork's folder, a checkpoint of ours (copied whole, so that a run goes on)
Numbers are kept as they are, bfloat16 too; the twins compute with float32 copies.
"""


def main(name: str, suffix: str, writes_official: bool, argv: Sequence[str] | None) -> None:
    """Convert SRC to DST; what the user can mend ends with one message and status 2.

    suffix: what is added to SRC's name where no DST is given. writes_official: offer --official.
    """
    parser = argparse.ArgumentParser(
        prog=f"python convert/{name}.py",
        description="Convert a checkpoint to a directory that both twins open as it is.",
        epilog=LAYOUTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SRC", type=Path, help="checkpoint file or directory")
    add("target", metavar="DST", type=Path, nargs="?", help=f"default: SRC{suffix}")
    add("--config", type=Path, help="config.json of a bare state dict (default: from shapes)")
    add("--tokenizer", help=f"gpt2, prosqa, a directory, or {NO_TOKENIZER} (default: SRC's, gpt2)")
    add("--latent-ids", type=_three_ids, metavar="S,E,L", help="ids of start, end and latent")
    add("--stage", type=_count, help="stage the model was trained to (default: beyond the last)")
    add("--c-thought", type=_count, help="latents a step (default: 1)")
    add("--max-latent-stage", type=_count, help="last stage that adds latents (default: 6)")
    add("--weights-only", action="store_true", help="leave out moments and trainer state")
    if writes_official:
        add("--official", type=Path, metavar="FILE", help="write the published state dict instead")
    options = parser.parse_args(argv)
    facts = Facts(
        options.tokenizer,
        options.latent_ids,
        options.stage,
        options.c_thought,
        options.max_latent_stage,
    )
    official = options.official if writes_official else None
    if official is not None and (options.target is not None or facts.given()):
        parser.error("--official takes neither DST nor facts about the tokenizer and the stages")
    target = options.target or Path(f"{str(options.source).rstrip('/')}{suffix}")

    def run() -> None:
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

    guarded(run)


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
