"""Models of the Hugging Face hub: into its shared cache, once, and never as pickled weights."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coconut.checkpoints.checkpoint import (
    COCONUT,
    CONFIG,
    FEEDBACK,
    WEIGHTS,
    WEIGHTS_INDEX,
    index_files,
    weight_files,
)
from coconut.checkpoints.verdict import judged
from coconut.errors import UserError
from coconut.files import read_json
from coconut.text.tokenizer import ENCODING_FILE, HF_COMPANIONS, HF_FILE, RANKS_FILE

DESCRIPTION = (
    CONFIG,
    COCONUT,
    WEIGHTS_INDEX,
    HF_FILE,
    *HF_COMPANIONS,
    RANKS_FILE,
    ENCODING_FILE,
)
"""What a model is and how it reads text: small files, fetched and checked before the weights."""


class HubUnreachable(UserError):
    """A model that is not in the cache, and no connection to fetch it by."""


def fetch(model_id: str, revision: str | None = None, with_weights: bool = True) -> Path:
    """Directory of a hub model in the cache; what is there already is not downloaded again.

    revision: branch, tag or commit; None is the main branch. with_weights False: only what
    describes the model. The hub's client reads HF_TOKEN, HF_HOME and HF_HUB_OFFLINE.
    Raises UserError: no such model or revision, no access, no connection, no safetensors, damaged
    files, unsupported config.json.
    """
    directory = _download(model_id, revision, DESCRIPTION, shows_progress=False)
    where = f"{model_id}/{CONFIG}"
    if not (directory / CONFIG).exists():
        raise UserError(model_id, f"has no {CONFIG} on the hub: not a transformers model")
    try:
        judged(read_json(directory / CONFIG), where)
        has_index = (directory / WEIGHTS_INDEX).exists()
        names = index_files(directory / WEIGHTS_INDEX) if has_index else [WEIGHTS]
    except UserError as error:
        if error.where == where:
            raise
        raise _damaged(model_id, error) from None
    if not with_weights:
        return directory
    # By its commit: what was just described, also if someone uploads meanwhile.
    commit = directory.name
    # A single file beside an index is what transformers reads: see `weight_files`.
    directory = _download(model_id, commit, [*DESCRIPTION, *names, WEIGHTS, FEEDBACK])
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise UserError(model_id, _without_safetensors(model_id, commit, missing))
    try:
        weight_files(directory)
    except UserError as error:
        raise _damaged(model_id, error) from None
    return directory


def _damaged(model_id: str, error: UserError) -> UserError:
    """What to say of a file of the cache: broken there or on the hub, and never asked for again."""
    path = Path(error.where)
    # The content behind the link: the client would only make a lost link anew.
    remedy = f"delete {path.resolve()} to fetch it anew"
    return UserError(f"{model_id}/{path.name}", f"{error.problems[0]}; {remedy}")


def missing_weights(model_id: str, revision: str | None = None) -> list[str] | None:
    """Weight files that a run would still fetch, as far as the cache tells; asks nobody.

    None: not even what describes the model is there.
    """
    import huggingface_hub

    def cached(name: str) -> Path | None:
        found = huggingface_hub.try_to_load_from_cache(model_id, name, revision=revision)
        return Path(found) if isinstance(found, str) else None

    if cached(CONFIG) is None:
        return None
    index = cached(WEIGHTS_INDEX)
    names = [WEIGHTS] if index is None else index_files(index)
    return [name for name in names if cached(name) is None]


def _download(
    model_id: str, revision: str | None, names: Sequence[str], shows_progress: bool = True
) -> Path:
    import huggingface_hub
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        """The client's own bar, on a terminal only."""

        def __init__(self, *args: Any, **options: Any) -> None:
            hidden = not (shows_progress and sys.stderr.isatty())
            super().__init__(*args, **options | ({"disable": True} if hidden else {}))

    named = f"{model_id} (revision {revision})" if revision else model_id
    connection_error = http_error()
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model_id,
                revision=revision,
                allow_patterns=list(names),
                library_name="mlx-coconut",
                tqdm_class=Bar,
            )
        )
    except errors.GatedRepoError:
        problem = "asks for a licence first: accept it on its page, then set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        problem = "no such model on the hub, and no such directory; check model_id (or HF_TOKEN)"
    except errors.RevisionNotFoundError:
        problem = "no such branch, tag or commit on the hub; check model_revision"
    except errors.HFValidationError:
        problem = "neither a directory nor a valid hub name (owner/name); check model_id"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise HubUnreachable(
            named,
            "not whole in the local cache, and HF_HUB_OFFLINE forbids the network; run once"
            " without it, or name a directory instead"
            if constants.HF_HUB_OFFLINE
            else "not in the local cache and the hub cannot be reached; connect once, or name a"
            " directory instead",
        ) from None
    except (connection_error, OSError) as error:
        status, reason = status_and_reason(error)
        if status == 401:
            problem = "the hub does not accept the token; set HF_TOKEN to a valid one, or unset it"
        else:
            problem = f"download failed ({reason}); run again: files that are whole are kept"
    raise UserError(named, problem)


def http_error() -> type[Exception]:
    """What the client's HTTP library raises: httpx's or, in later versions, httpx2's."""
    from huggingface_hub.errors import HfHubHTTPError

    base: type[Exception] = HfHubHTTPError.__bases__[0]
    return base


def status_and_reason(error: Exception) -> tuple[int | None, str]:
    """(HTTP status of an answer if there was one, what went wrong in one line)."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status, (str(error) or type(error).__name__).splitlines()[0]


def _without_safetensors(model_id: str, commit: str, missing: Sequence[str]) -> str:
    """What to say of a model whose weights are not where they should be."""
    import huggingface_hub

    try:
        found = huggingface_hub.HfApi().list_repo_files(model_id, revision=commit)
    except (http_error(), OSError):
        found = []
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in found):
        return (
            "has pickled weights only, which are never fetched (opening them can run code); convert"
            " a copy you trust: python convert/torch_to_mlx.py DOWNLOADED DIRECTORY"
        )
    return f"lacks {', '.join(missing)} on the hub; only safetensors weights are read"
