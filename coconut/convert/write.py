"""Writing a checkpoint: our directory, which both twins open, or the published state dict."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coconut import files
from coconut.checkpoints import checkpoint as layout
from coconut.checkpoints.architectures import WRAPPER_COPY
from coconut.checkpoints.model_args import FORK_IDS, HEAD
from coconut.convert.read import Checkpoint
from coconut.convert.tensors import to_torch, write_weights
from coconut.errors import UserError
from coconut.feedback.rules import parse
from coconut.files import writing
from coconut.text.opening import load_tokenizer
from coconut.text.tokenizer import HF_FILE, RANKS_FILE, Tokenizer

NO_TOKENIZER = "none"
PUBLISHED = {"c_thought": 1, "max_latent_stage": 6}
"""The schedule of the published ProsQA and ProntoQA runs (GSM8K: 2 and 3)."""


@dataclass(frozen=True)
class Facts:
    """What a foreign checkpoint does not say of itself; None where the user did not say either."""

    tokenizer: str | None = None
    latent_ids: Sequence[int] | None = None
    stage: int | None = None
    c_thought: int | None = None
    max_latent_stage: int | None = None

    def given(self) -> list[str]:
        """The options in use, as written on the command line."""
        return [f"--{n.replace('_', '-')}" for n, v in vars(self).items() if v is not None]


TRAINING_FILES = ("optimizer.safetensors", "trainer_state.json")


def write_directory(
    found: Checkpoint, target: Path, facts: Facts, weights_only: bool = False
) -> list[str]:
    """Write our directory; returns what was assumed or chosen, a line each.

    Our own directories are copied file by file: weights, moments, trainer state, tokenizer.
    weights_only: without what only a run that goes on needs, two thirds of the size.
    Raises UserError before anything is written: target in the way, no tokenizer, facts that
    contradict the checkpoint.
    """
    refuse_existing(target)
    if found.coconut is not None:
        assert found.directory is not None, "coconut.json was read from it"
        if facts.given():
            raise UserError(
                str(found.directory),
                f"says itself what {', '.join(facts.given())} would: remove the options",
            )
        with layout.write_atomically(target) as partial:
            for path in sorted(found.directory.iterdir()):
                left_out = (layout.CHECKSUMS, *TRAINING_FILES * weights_only)
                if path.is_file() and path.name not in left_out:
                    shutil.copyfile(path, partial / path.name)
        return ["copied file by file"]

    tokenizer, notes = _tokenizer(found, facts)
    coconut = None
    if found.has_latents:
        coconut, assumed = _coconut(found, facts, tokenizer)
        notes += assumed
    elif pointless := [name for name in facts.given() if name != "--tokenizer"]:
        raise UserError(found.kind, f"a plain model has no latents: remove {', '.join(pointless)}")
    # The fork's ids are in coconut.json from now on.
    config = {k: v for k, v in found.config.items() if k not in (*FORK_IDS, "replacement_method")}
    if tokenizer is not None and "eos_token_id" not in config:
        config["bos_token_id"] = config["eos_token_id"] = tokenizer.eos_id
    with layout.write_atomically(target) as partial:
        files.write_json(partial / layout.CONFIG, config)
        write_weights(partial, found.tensors)
        if tokenizer is not None:
            tokenizer.save(partial)
        if coconut is not None:
            files.write_json(partial / layout.COCONUT, coconut)
    return notes


def write_official(found: Checkpoint, target: Path) -> list[str]:
    """Write a torch state dict under the published names, which the published code loads.

    The tied embedding is one tensor under each of its names. Types are kept. Returns what to know.
    Raises UserError if the target is in the way or torch is not installed.
    """
    refuse_existing(target)
    try:
        import torch
    except ImportError:
        raise UserError(
            str(target), "writing a torch file needs torch: pip install torch"
        ) from None
    arch = found.architecture
    state = {
        arch.official_name(name, found.has_latents): to_torch(tensor)
        for name, tensor in found.tensors.items()
    }
    embedding = state[arch.official_name(arch.embedding, found.has_latents)]
    state.setdefault(arch.official_name(HEAD, found.has_latents), embedding)
    if found.has_latents:
        state[WRAPPER_COPY] = embedding
    # A file, not its path: torch would write the path's name into the archive.
    with writing(target) as partial, open(partial, "wb") as file:
        torch.save(state, file)
    kind = "Coconut" if found.has_latents else "CoT"
    notes = [f"official {kind} layout; load_model_path of the published code takes it"]
    rule = (found.coconut or {}).get("feedback") or "last"
    if rule != "last":
        notes.append(
            f"feedback {rule}: not part of that layout, and the published code feeds back `last`"
            " only; there this model computes something else"
        )
    return notes


def refuse_existing(target: Path) -> None:
    """Raise UserError if something of this name exists: nothing is ever replaced."""
    if target.exists() or target.is_symlink():
        raise UserError(str(target), "exists already: remove it or name another target")


def _tokenizer(found: Checkpoint, facts: Facts) -> tuple[Tokenizer | None, list[str]]:
    """(tokenizer with markers if the model has latents, notes)."""
    rows, notes, name = found.n_rows, [], facts.tokenizer
    own = found.directory
    if name == NO_TOKENIZER:
        return None, ["no tokenizer written: set the key tokenizer in the run's YAML"]
    if name is None and own is not None and _holds_tokenizer(own):
        name = str(own)
    elif name is None and found.architecture.model_type == "gpt2" and rows in (50257, 50260):
        name = "gpt2"
        notes.append("tokenizer gpt2, since the vocabulary is GPT-2's")
    elif name is None:
        raise UserError(
            str(own or found.kind),
            f"brings no tokenizer, and {rows:,} rows do not tell which: give --tokenizer gpt2,"
            f" prosqa or a directory (or {NO_TOKENIZER})",
        )
    tokenizer = load_tokenizer(name)
    if found.has_latents:
        tokenizer = tokenizer.with_latents()
    if len(tokenizer) > rows:
        raise UserError(
            name,
            f"the tokenizer needs {len(tokenizer):,} rows, the model has {rows:,}: not its own",
        )
    return tokenizer, notes


def _holds_tokenizer(directory: Path) -> bool:
    return any((directory / name).exists() for name in (HF_FILE, RANKS_FILE, "vocab.json"))


def _coconut(
    found: Checkpoint, facts: Facts, tokenizer: Tokenizer | None
) -> tuple[dict[str, Any], list[str]]:
    """(coconut.json, what was assumed) of a foreign checkpoint trained with latents."""
    c = _known(facts.c_thought, PUBLISHED["c_thought"])
    most = _known(facts.max_latent_stage, PUBLISHED["max_latent_stage"])
    stage = _known(facts.stage, most + 1)
    notes = []
    if None in (facts.stage, facts.c_thought, facts.max_latent_stage):
        notes.append(
            f"assumed as in the published ProsQA run: stage {stage}, c_thought {c},"
            f" max_latent_stage {most}; --stage, --c-thought, --max-latent-stage say otherwise"
            " (GSM8K: 4, 2, 3)"
        )
    named = str(found.config.get("replacement_method", "-1"))
    try:
        rule = parse(named)
    except ValueError as error:
        raise UserError(
            str(found.directory or found.kind), f"replacement_method: {error}"
        ) from None
    if not rule.is_last:
        notes.append(f"replacement_method {named}: feedback {rule} (docs/feedback.md)")
    return {
        "format_version": layout.FORMAT_VERSION,
        "method": "coconut",
        "feedback": str(rule),
        "stage": stage,
        "c_thought": c,
        "max_latent_stage": most,
        "pad_latent_to_max": True,
        # All known code grows by whole stages, on answers and printed steps alone.
        "latent_growth": "stage",
        "labelled_thoughts": False,
        "latent_ids": _latent_ids(found, facts, tokenizer),
    }, notes


def _latent_ids(found: Checkpoint, facts: Facts, tokenizer: Tokenizer | None) -> list[int]:
    """Start, end, latent: all who name them must agree. Raises UserError if not."""
    said = {}
    if facts.latent_ids is not None:
        said["--latent-ids"] = list(facts.latent_ids)
    if all(name in found.config for name in FORK_IDS):
        said["config.json"] = [found.config[name] for name in FORK_IDS]
    if tokenizer is not None:
        markers = (tokenizer.start_id, tokenizer.end_id, tokenizer.latent_id)
        said["the tokenizer"] = [marker for marker in markers if marker is not None]
    if not said:
        raise UserError(found.kind, "without a tokenizer its latent tokens need --latent-ids S,E,L")
    first, *others = said.values()
    if any(other != first for other in others):
        told = "; ".join(f"{who} says {ids}" for who, ids in said.items())
        raise UserError(found.kind, f"ids of start, end and latent disagree: {told}")
    if len(set(first)) != 3 or not all(type(i) is int and 0 <= i < found.n_rows for i in first):
        raise UserError(
            found.kind, f"latent ids {first}: expected three rows among {found.n_rows:,}"
        )
    return first


def _known(said: int | None, published: int) -> int:
    return published if said is None else said
