"""Where a run's model and tokenizer come from: a checkpoint, the hub, or random weights."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from coconut.checkpoints.adapter_files import fingerprint, is_adapter, read_adapter
from coconut.checkpoints.adapters import Adapter
from coconut.checkpoints.architectures import n_positions
from coconut.checkpoints.checkpoint import COCONUT, describe, verify
from coconut.checkpoints.hub import fetch
from coconut.checkpoints.verdict import judged
from coconut.config.keys import LATENT_GROWTH, RunConfig
from coconut.config.lora_keys import Lora
from coconut.config.methods import METHODS, WITH_FEEDBACK
from coconut.errors import UserError
from coconut.feedback.rules import parse
from coconut.feedback.weights import Setup
from coconut.files import read_json
from coconut.text.opening import load_tokenizer
from coconut.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Opened:
    """A model ready to be built, its tokenizer (markers added if the method needs them), and what
    its checkpoint says of itself (coconut.json; None for a plain model)."""

    source: Source
    tokenizer: Tokenizer
    coconut: dict[str, Any] | None


def open_source(
    config: RunConfig, resume_from: Path | None = None, with_weights: bool = True
) -> Opened:
    """Find, check and describe the model of a run without opening a framework.

    resume_from: a checkpoint of this run, which comes before every configured one. with_weights
    False: a model of the hub is described without downloading or checking its weights.
    Raises UserError: nothing there, damaged, or a Coconut checkpoint for a plain method.
    """
    directory, on_hub = resume_from, False
    if directory is None and config.load_model_path:
        directory = Path(config.load_model_path)
        if directory.is_file():
            raise UserError(
                str(directory),
                "a file; convert it first: python convert/torch_to_mlx.py "
                f"{directory} DIRECTORY, then give the directory",
            )
    if directory is None and config.model_id:
        directory = Path(config.model_id)
        if not os.path.isdir(directory):
            on_hub = True
            directory = fetch(config.model_id, config.model_revision, with_weights)
    if directory is None:
        return _from_config(config)

    if (directory / "checksums.json").exists():
        verify(directory)
    found = describe(directory, with_weights or not on_hub)
    made_with = found["coconut"]
    # A run's own checkpoint is read as it was written, whatever the configuration says now.
    own_tokenizer = resume_from is not None or config.tokenizer is None
    tokenizer = load_tokenizer(directory if own_tokenizer else str(config.tokenizer))
    if made_with is not None:
        _check_made_with(directory / COCONUT, made_with)
    if made_with is not None and not config.has_latents and made_with.get("latent_ids"):
        remedy = "choose a method with latents or a plain checkpoint"
        if config.method == made_with.get("method") == "latro":
            remedy = f"set latro_latents: {made_with.get('c_thought')}, as in its training"
        raise UserError(
            str(directory),
            f"holds a model trained with latents ({made_with.get('method')}), which method"
            f" {config.method} cannot run; {remedy}",
        )
    rows = found["config"]["vocab_size"]
    if len(tokenizer) > rows:
        raise UserError(
            str(directory),
            f"its tokenizer has {len(tokenizer)} tokens but its model only {rows} rows; give the"
            " tokenizer it was trained with (key tokenizer)",
        )
    model, adapter = found["config"], None
    if is_adapter(directory):
        adapter = read_adapter(directory)
        _check_settings(config, adapter)
        directory = base_of(adapter, config.model_id)
        model = describe(directory)["config"]
    elif config.adapter is not None:
        is_there = with_weights or not on_hub
        base = str(config.model_id) if on_hub else str(directory.resolve())
        # Its rows and new tokens follow from the tokenizer.
        sha = fingerprint(directory) if is_there else ""
        revision = config.model_revision if on_hub else None
        adapter = Adapter(config.adapter, (), base, sha, range(0), None, revision, config.seed)
    _check_trainable(config, model, adapter, directory)
    return _opened(config, model, directory, tokenizer, made_with, adapter)


def base_of(adapter: Adapter, given: str | None) -> Path:
    """Directory of an adapter's base: where it was, or if it is gone `given` (the key model_id).

    Raises UserError if it is not found, or is not the model that the adapter was trained beside.
    """
    name, where = adapter.base, str(adapter.directory)
    if os.path.isabs(name) and not os.path.isdir(name):
        if given is None:
            raise UserError(
                where,
                f"its base {name} is gone; bring it back, or say where it is (--base DIR, in a run"
                " model_id=DIR)",
            )
        name = given
    directory = Path(name) if os.path.isdir(name) else fetch(name, adapter.revision)
    if (directory / "checksums.json").exists():
        verify(directory)
    if is_adapter(directory):
        raise UserError(where, f"its base {name} is an adapter itself; fuse that one first")
    if fingerprint(directory) != adapter.base_sha256:
        raise UserError(
            where,
            f"was trained beside other weights than {name} holds now; give the right base"
            " (--base DIR, in a run model_id=DIR)",
        )
    return directory


def _check_settings(config: RunConfig, adapter: Adapter) -> None:
    """Raise UserError if the configuration wants another adapter than the one found."""
    wanted, found = config.adapter, adapter.lora
    where = str(adapter.directory)
    if wanted is None:
        if not config.only_eval:
            raise UserError(
                where,
                "holds an adapter; set the keys of lora to train it on, or make a whole"
                " checkpoint of it first (mlx-coconut fuse)",
            )
        return
    differing = [
        f"lora.{f.name}: the adapter has {getattr(found, f.name)}, not {getattr(wanted, f.name)}"
        for f in fields(Lora)
        if getattr(found, f.name) != getattr(wanted, f.name)
    ]
    if differing:
        raise UserError(where, *differing)


def _check_trainable(
    config: RunConfig, model: dict[str, Any], adapter: Adapter | None, directory: Path
) -> None:
    """Raise UserError where weights are quantised and would be trained, or quantised twice."""
    lora = config.adapter
    if model.get("quantization") and lora is None and not config.only_eval:
        raise UserError(
            str(directory), "quantised weights cannot be trained; train beside them (keys of lora)"
        )
    if model.get("quantization") and lora is not None and lora.quantize is not None:
        raise UserError(str(directory), "is quantised already; remove lora.quantize")
    if lora is not None and config.only_eval and adapter is not None and adapter.directory is None:
        raise UserError(str(directory), "holds no adapter to evaluate; remove the keys of lora")


def _from_config(config: RunConfig) -> Opened:
    assert config.model_config_path and config.tokenizer, "checked with the configuration"
    where = config.model_config_path
    tokenizer = load_tokenizer(config.tokenizer)
    # Its rows will be the tokenizer's: it need not say how many.
    model = judged({"vocab_size": len(tokenizer)} | read_json(Path(where)), where)
    return _opened(config, model, None, tokenizer, None)


def _opened(
    config: RunConfig,
    model: dict[str, Any],
    directory: Path | None,
    tokenizer: Tokenizer,
    made_with: dict[str, Any] | None,
    adapter: Adapter | None = None,
) -> Opened:
    before = len(tokenizer)
    trained = made_with.get("latent_ids") if made_with is not None else None
    if config.has_latents:
        tokenizer = tokenizer.with_latents()
    ids = [tokenizer.start_id, tokenizer.end_id, tokenizer.latent_id]
    if trained and trained != ids:
        raise UserError(
            str(directory),
            f"was trained with the latent tokens {trained}, but its tokenizer numbers them {ids};"
            " give the tokenizer it was trained with (key tokenizer)",
        )
    # Only rows that are new: markers that a checkpoint has trained are left as they are.
    new_tokens = range(0) if trained else range(before, len(tokenizer))
    if adapter is not None and adapter.directory is None:
        # The base may know nothing of the latent tokens, so their rows are trained.
        rows = tuple(i for i in ids if i is not None)
        adapter = replace(adapter, rows=rows, new_tokens=new_tokens)
    elif adapter is not None:
        new_tokens = adapter.new_tokens
    source = Source(
        config=_described(model, tokenizer),
        directory=directory,
        vocab_size=len(tokenizer),
        new_tokens=new_tokens,
        copy_from=tokenizer.token_id("<<"),
        feedback=_feedback(config, model, directory, tokenizer, made_with),
        adapter=adapter,
    )
    return Opened(source, tokenizer, made_with)


def _feedback(
    config: RunConfig,
    model: dict[str, Any],
    directory: Path | None,
    tokenizer: Tokenizer,
    made_with: dict[str, Any] | None,
) -> Setup | None:
    """The rule of a run: the configured one, else the checkpoint's, else the published one.

    Raises UserError if they differ and it was not asked for, or the model cannot run it.
    """
    if config.method not in WITH_FEEDBACK or not config.has_latents:
        return None
    trained = made_with or {}
    own = None
    # A LaTRO run without thoughts has fed nothing back.
    thought = trained.get("method") != "latro" or trained.get("latent_ids")
    if trained.get("method") in WITH_FEEDBACK and thought:
        own = parse(trained.get("feedback") or "last")
    asked = parse(config.feedback) if config.feedback else own or parse("last")
    if own is not None and asked != own and not config.replace_feedback:
        raise UserError(
            str(directory),
            f"was trained with feedback {own}, not {asked}; remove the key feedback, or set"
            " replace_feedback: True to go on with another rule",
        )
    assert tokenizer.start_id is not None and tokenizer.end_id is not None
    assert tokenizer.latent_id is not None, "given with the method"
    markers = (tokenizer.start_id, tokenizer.end_id, tokenizer.latent_id)
    if config.method == "latro" and asked.unscored:
        raise UserError(
            config.where if config.feedback else str(directory),
            f"feedback {asked}: latro cannot score {', '.join(asked.unscored)}; set feedback to a"
            " rule without (and replace_feedback: True if the checkpoint has another)",
        )
    # Noise has no weights: with or without it they are the same rule's.
    is_trained = own is not None and asked.without_noise == own.without_noise
    if config.method == "latro" and asked.is_fitted and not is_trained:
        raise UserError(
            config.where if config.feedback else str(directory),
            f"feedback {asked}: latro fits no linear; start from a checkpoint that has it",
        )
    setup = Setup(asked, markers, tokenizer.eos_id, len(tokenizer), is_trained)
    n_layers = model.get("n_layer", model.get("num_hidden_layers"))
    n_rows = max(model.get("vocab_size") or 0, len(tokenizer))
    if type(n_layers) is int and (problems := setup.problems(n_layers, n_rows)):
        raise UserError(config.where if config.feedback else str(directory), *problems)
    return setup


def _check_made_with(path: Path, made_with: dict[str, Any]) -> None:
    """Raise UserError for wrong fields of coconut.json; a converter may leave some out."""
    found = {name: value for name, value in made_with.items() if value is not None}
    ids = found.get("latent_ids", [0, 0, 0])
    problems = []
    if found.get("method", "coconut") not in METHODS:
        problems.append(f"method: expected one of {', '.join(METHODS)}")
    try:
        parse(str(found.get("feedback", "last")))
    except ValueError as error:
        problems.append(f"feedback: {error}")
    if not isinstance(ids, list) or len(ids) != 3 or any(type(i) is not int for i in ids):
        problems.append("latent_ids: expected three ids, or null for a model without latents")
    for name in ("stage", "c_thought", "max_latent_stage"):
        value = found.get(name, 0)
        if type(value) is not int or not 0 <= value < 2**31:
            problems.append(f"{name}: expected a whole number")
    for name in ("pad_latent_to_max", "labelled_thoughts"):
        if type(found.get(name, True)) is not bool:
            problems.append(f"{name}: expected true or false")
    if found.get("latent_growth", "one") not in LATENT_GROWTH:
        problems.append(f"latent_growth: expected one of {', '.join(LATENT_GROWTH)}")
    if problems:
        raise UserError(str(path), *problems)


def _described(model: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json with what other programs want to find in it: the token that ends a text
    (transformers would take GPT-2's own id), and n_ctx, without which mlx_lm opens no GPT-2."""
    known = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
    if "n_positions" in model:
        known["n_ctx"] = model["n_positions"]
    return known | model


@dataclass(frozen=True)
class Source:
    """Where a model comes from, and the vocabulary it is to have.

    config: its config.json. directory: a checkpoint with weights, or None for random ones.
    vocab_size: rows the embedding needs at least. new_tokens: ids whose rows must be set anew, from
    the row of copy_from, or at random if that is None. adapter: what is trained beside it, if the
    weights themselves are frozen.
    """

    config: dict[str, Any]
    directory: Path | None
    vocab_size: int
    new_tokens: range
    copy_from: int | None
    feedback: Setup | None = None
    """The rule that latents are fed by, if there are any."""
    adapter: Adapter | None = None

    @property
    def n_positions(self) -> int | None:
        """Positions the model has, or of a borrowed one those within its sliding window."""
        return n_positions(self.config)
