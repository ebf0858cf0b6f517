"""Where a run's model and tokenizer come from: a checkpoint, the hub, or random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coconut.backend import Source
from coconut.checkpoint import describe, read_json, verify
from coconut.config import WITH_LATENTS, RunConfig
from coconut.errors import UserError
from coconut.tokens import Tokenizer, load_tokenizer

HUB_FILES = ("*.json", "*.safetensors", "*.txt", "tokenizer.model")
"""What is fetched from the hub: never pickled weights."""


@dataclass(frozen=True)
class Opened:
    """A model ready to be built, its tokenizer (markers added if the method needs them), and what
    its checkpoint says of itself (coconut.json; None for a plain model)."""

    source: Source
    tokenizer: Tokenizer
    coconut: dict[str, Any] | None


def open_source(config: RunConfig, resume_from: Path | None = None) -> Opened:
    """Find, check and describe the model of a run without opening a framework.

    resume_from: a checkpoint of this run, which comes before every configured one.
    Raises UserError: nothing there, damaged, or a Coconut checkpoint for a plain method.
    """
    directory = resume_from
    if directory is None and config.load_model_path:
        directory = Path(config.load_model_path)
        if directory.is_file():
            raise UserError(
                str(directory),
                "a file; convert it first: python convert/torch_to_mlx.py "
                f"{directory} DIRECTORY, then give the directory",
            )
    if directory is None and config.model_id:
        local = Path(config.model_id)
        directory = local if local.is_dir() else fetch(config.model_id)
    if directory is None:
        return _from_config(config)

    if (directory / "checksums.json").exists():
        verify(directory)
    found = describe(directory)
    tokenizer = load_tokenizer(config.tokenizer or directory)
    made_with = found["coconut"]
    if made_with is not None and config.method not in WITH_LATENTS and made_with["latent_ids"]:
        raise UserError(
            str(directory),
            f"holds a model trained with latents ({made_with['method']}), which method"
            f" {config.method} cannot run; choose a method with latents or a plain checkpoint",
        )
    rows = found["config"].get("vocab_size", 0)
    if len(tokenizer) > rows:
        raise UserError(
            str(directory),
            f"its tokenizer has {len(tokenizer)} tokens but its model only {rows} rows; give the"
            " tokenizer it was trained with (key tokenizer)",
        )
    return _opened(config, found["config"], directory, tokenizer, made_with)


def _from_config(config: RunConfig) -> Opened:
    assert config.model_config_path and config.tokenizer, "checked with the configuration"
    model = read_json(Path(config.model_config_path))
    return _opened(config, model, None, load_tokenizer(config.tokenizer), None)


def _opened(
    config: RunConfig,
    model: dict[str, Any],
    directory: Path | None,
    tokenizer: Tokenizer,
    made_with: dict[str, Any] | None,
) -> Opened:
    before = len(tokenizer)
    if config.method in WITH_LATENTS:
        tokenizer = tokenizer.with_latents()
    source = Source(
        config=model,
        directory=directory,
        vocab_size=len(tokenizer),
        # Only rows that are new: markers that a checkpoint has trained are left as they are.
        new_tokens=range(before, len(tokenizer)),
        copy_from=tokenizer.token_id("<<"),
    )
    return Opened(source, tokenizer, made_with)


def fetch(model_id: str) -> Path:
    """Directory of a hub model, downloaded once into the cache (HF_HUB_OFFLINE is respected)."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(model_id, allow_patterns=list(HUB_FILES)))
    except errors.GatedRepoError:
        problem = "asks for a licence first: accept it on its page, then set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        problem = "no such model on the hub, and no such directory; check model_id (or HF_TOKEN)"
    except errors.HFValidationError:
        problem = "neither a directory nor a valid hub name (owner/name); check model_id"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        problem = (
            "not in the local cache and the hub cannot be reached; connect once, or give a"
            " directory as model_id"
        )
    except (errors.HfHubHTTPError, OSError) as error:
        problem = f"download failed ({str(error).splitlines()[0]}); run again, it resumes"
    raise UserError(model_id, problem)
