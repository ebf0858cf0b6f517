"""A run's model as far as it can be known without building it: size, tokens, what is missing."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coconut.checkpoints.adapters import check_twin
from coconut.checkpoints.hub import HubUnreachable, missing_weights
from coconut.checkpoints.model_args import PUBLISHED_SHAPES
from coconut.checkpoints.source import Source, open_source
from coconut.config.keys import RunConfig
from coconut.config.methods import WITH_LATENTS
from coconut.errors import UserError
from coconut.plan.memory import Shape, shape_of
from coconut.text.opening import load_tokenizer
from coconut.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Model:
    """What is known of a run's model. None where it has to be downloaded first."""

    name: str
    shape: Shape | None
    tokenizer: Tokenizer | None
    coconut: dict[str, Any] | None
    note: str = ""
    source: Source | None = None


def find_model(config: RunConfig, newest: Path | None, twin: str) -> Model:
    """The model of a run, described without its weights. Raises UserError, also if twin cannot."""
    name = str(newest or config.load_model_path or config.model_id or config.model_config_path)
    try:
        opened = open_source(config, newest, with_weights=False)
    except HubUnreachable:
        return _not_downloaded(config, name)
    source = opened.source
    where, rows = str(config.model_config_path), 0
    if source.directory is not None:
        where, rows = str(source.directory / "config.json"), source.config["vocab_size"]
    shape = shape_of(source.config, max(source.vocab_size, rows), where)
    check_twin(twin, config.adapter, source.config, name)
    return Model(name, shape, opened.tokenizer, opened.coconut, source=source)


def _not_downloaded(config: RunConfig, name: str) -> Model:
    known = PUBLISHED_SHAPES.get(name.removeprefix("openai-community/"))
    which = config.tokenizer or ("gpt2" if known else None)
    note = f"{name}: not downloaded yet, and the hub cannot be reached; "
    note += "published shape" if known else "its size is unknown until it is"
    tokenizer = None
    if which is None:
        note += ", and so are its tokens"
    else:
        try:
            tokenizer = load_tokenizer(which)
        except UserError as error:
            # The vocabulary is fetched with the model; all that needs no tokens can be checked.
            if which != "gpt2":
                raise
            note += f"; lengths are unknown: {error}"
    if tokenizer is not None and config.method in WITH_LATENTS:
        tokenizer = tokenizer.with_latents()
    shape = None
    if known:
        n_markers = 3 if config.method in WITH_LATENTS else 0
        rows = known["vocab_size"] + n_markers if tokenizer is None else len(tokenizer)
        shape = shape_of(known, max(known["vocab_size"], rows), name)
    return Model(name, shape, tokenizer, None, note)


def to_fetch(config: RunConfig, newest: Path | None) -> str:
    """What of a model of the hub a run would still download, in words; empty if nothing."""
    name = config.model_id
    if newest is not None or config.load_model_path or not name or os.path.isdir(name):
        return ""
    missing = missing_weights(name, config.model_revision)
    if missing == []:
        return ""
    names = "its description, tokenizer and weights" if missing is None else ", ".join(missing)
    return f"a run would fetch from the hub: {name}: {names}"
