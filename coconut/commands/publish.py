"""`mlx-coconut publish DIR --repo OWNER/NAME`: a checkpoint and its model card -> the hub."""

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from coconut.checkpoints.adapter_files import is_adapter
from coconut.checkpoints.checkpoint import (
    CHECKSUMS,
    FEEDBACK,
    describe,
    epoch_of,
    verify,
    weight_files,
)
from coconut.checkpoints.hub import DESCRIPTION, http_error, status_and_reason
from coconut.config.methods import DATASET_METHODS
from coconut.errors import UserError, guarded, options_of, typed
from coconut.files import read_json
from coconut.run.changed import settings_of

CARD, SUMMARY = "README.md", "summary.json"
ASKED = ("method", "c_thought", "max_latent_stage", "pad_latent_to_max", "stage")
"""Fields of coconut.json that an evaluation is asked under."""
MEASURED = ("n", "accuracy", "swapped_accuracy", "both_accuracy", "maj_k", "maj_accuracy", "split")


def main(twin: str, argv: Sequence[str] | None = None) -> None:
    """Publish one checkpoint; what the user can mend ends with one message and status 2."""
    parser = options_of(twin, "publish", "Upload a checkpoint with a model card.")
    parser.add_argument("directory", metavar="DIR", type=Path, help="checkpoint")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="repository")
    parser.add_argument("--summary", metavar="FILE", type=Path, help="results (the run's own)")
    parser.add_argument("--base", metavar="NAME", help="trained from; else the run's config.yaml's")
    parser.add_argument("--data", metavar="NAME", help="trained on; else the run's config.yaml's")
    parser.add_argument(
        "--license", metavar="ID", type=_licence, help="of the weights, as the hub names it (mit)"
    )
    parser.add_argument("--dry-run", action="store_true", help="show card and files, send nothing")
    parser.add_argument("--private", action="store_true", help="a private repository")
    parser.add_argument("--revision", metavar="BRANCH", help="branch (main); made if missing")
    guarded(lambda: publish(parser.parse_args(argv)))


def _licence(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no identifier like apache-2.0, mit or other")
    return text


def publish(options: argparse.Namespace) -> None:
    """Check the checkpoint, write its card, then upload both in one commit."""
    directory, repo = options.directory, options.repo
    if not _is_hub_name(repo):
        raise UserError(repo, "not a valid hub name; give --repo OWNER/NAME")
    # First of all: an adapter lacks the files that the checks of a whole checkpoint ask for.
    if directory.is_dir() and is_adapter(directory):
        raise UserError(str(directory), "holds an adapter only; fuse it first (mlx-coconut fuse)")
    names = files_of(directory)
    text = card(directory, options)
    if options.dry_run:
        print(text)
        for name in names:
            print(f"{(directory / name).stat().st_size:>14,}  {name}")
        print(f"{len(text.encode()):>14,}  {CARD}")
        return
    print(f"wrote {_upload(directory, names, text, options)}")


def _is_hub_name(name: str) -> bool:
    from huggingface_hub import errors
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        return False
    return name.count("/") == 1


def files_of(directory: Path) -> list[str]:
    """Names of what coconut.hub fetches again: no optimizer or trainer state, no checksums."""
    describe(directory)
    if (directory / CHECKSUMS).exists():
        verify(directory)
    described = [name for name in (*DESCRIPTION, FEEDBACK) if (directory / name).is_file()]
    return list(dict.fromkeys([*described, *weight_files(directory)]))


def card(directory: Path, options: argparse.Namespace) -> str:
    """The model card; results that nobody measured are said to be so.

    Raises UserError: a named summary that is missing or damaged, or base or data that neither the
    run's config.yaml nor the command line tell.
    """
    found = describe(directory)
    made_with, settings = found["coconut"] or {}, settings_of(directory.resolve().parent)
    base, data = options.base or _base(settings), options.data or _data(settings)
    untold = [f"--{name}" for name, told in (("base", base), ("data", data)) if not told]
    if untold:
        raise UserError(
            str(directory),
            f"nothing beside it (the run's config.yaml) says what it was trained from and on: give"
            f" {' and '.join(untold)} (--base none for random weights)",
        )
    facts = {
        "Model": f"{found['model_type']}, {_n_weights(found) / 1e6:,.2f} M weights",
        "Base model": "none: random weights" if base == "none" else base,
        "Data": data,
        "Method": made_with.get("method", "not recorded"),
        "Feedback rule": json.dumps(made_with.get("feedback", "not recorded")).strip('"'),
        "Stage": made_with.get("stage", "not recorded"),
    }
    head: dict[str, Any] = {"library_name": "mlx-coconut", "tags": ["coconut", "latent-reasoning"]}
    if base and (options.base or settings.get("model_id") == base) and _is_hub_name(base):
        head["base_model"] = base
    if options.license:
        head["license"] = options.license
    terms = f"The weights: {options.license}." if options.license else _TERMS
    parts = [
        "---",
        yaml.safe_dump(head).strip(),
        "---",
        f"# {options.repo}",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        *("", "## Results", "", *_results(directory, options.summary)),
        *("", "## Use", "", *_use(options, settings, found)),
        *("", "## Licence", "", f"{terms} The program is MIT."),
    ]
    return "\n".join(parts) + "\n"


_TERMS = "The weights follow the terms of base model and data."


def _base(settings: dict[str, Any]) -> str | None:
    """What a run began from. A directory's path is nobody else's business."""
    if before := settings.get("load_model_path"):
        return f"{Path(before).name} of {Path(before).resolve().parent.name}, a checkpoint"
    if name := settings.get("model_id"):
        return Path(name).name if Path(name).exists() else str(name)
    return "none" if settings.get("model_config_path") else None


def _data(settings: dict[str, Any]) -> str | None:
    """What a run was trained on."""
    if path := settings.get("train_path"):
        return Path(path).name
    if made := settings.get("generate"):
        return f"made by data/prosqa.py: {json.dumps(made)}"
    return settings.get("dataset_name")


def _n_weights(found: dict[str, Any]) -> int:
    return sum(math.prod(entry.shape) for entry in found["tensors"].values())


def _results(directory: Path, summary: Path | None) -> list[str]:
    """Lines of the results: of the summary named, or the run's own if it is of this checkpoint."""
    path = summary or directory.resolve().parent / SUMMARY
    results = read_json(path) if summary or path.is_file() else {}
    if results and not summary and not _is_of(results, directory):
        print(f"{path}: of another checkpoint; the card says so (--summary FILE)", file=sys.stderr)
        results = {}
    measured = [f"| {name} | {results[name]} |" for name in MEASURED if name in results]
    if not measured:
        return ["Not measured."]
    by = ", ".join(str(results[n]) for n in ("backend", "device", "dtype") if results.get(n))
    on = f" on {Path(str(results['data'])).name}" if results.get("data") else ""
    told = [f"Measured{on}{f' by {by}' if by else ''}:", ""] if on or by else []
    return [*told, "| measure | value |", "| --- | --- |", *measured]


def _is_of(results: dict[str, Any], directory: Path) -> bool:
    """Whether a run's summary was measured on this one of its checkpoints."""
    if results.get("epoch") is not None:
        return results["epoch"] == epoch_of(directory)
    if "update" in results:
        return directory.name == f"update_{results['update']:04d}"
    return Path(str(results.get("checkpoint"))).resolve() == directory.resolve()


def _use(
    options: argparse.Namespace, settings: dict[str, Any], found: dict[str, Any]
) -> Iterator[str]:
    """How to ask the published model, and how to measure it, on either side."""
    repo, made_with = options.repo, found["coconut"] or {"method": "cot"}
    # MLX's quantised weights are MLX's alone.
    twins = ("mlx_coconut", "cuda_coconut")[: 1 if found["config"].get("quantization") else 2]
    yield "With mlx-coconut installed, in MLX or with torch:"
    yield ""
    if options.revision:
        yield f"    hf download {repo} --revision {options.revision} --local-dir model"
    for twin in twins:
        model = "model" if options.revision else repo
        yield f'    {typed(twin, "generate")} --model {model} --question "..."'
    if made_with.get("method") in DATASET_METHODS:
        return
    evaluation = {name: made_with[name] for name in ASKED if made_with.get(name) is not None}
    evaluation |= {"model_id": repo, "only_eval": True}
    if options.revision:
        evaluation["model_revision"] = options.revision
    path = str(settings.get("val_path") or "")
    # A file of the project's own is there for everybody.
    is_ours = path.startswith("data/") and ".." not in path
    evaluation["val_path"] = path if is_ours else "QUESTIONS.json"
    yield from ("", "To measure it, as `eval.yaml`:", "", "```yaml")
    yield from yaml.safe_dump(evaluation, sort_keys=False).splitlines()
    yield from ("```", "")
    yield from (f"    {typed(twin, 'run')} eval.yaml" for twin in twins)


def _upload(directory: Path, names: list[str], text: str, options: argparse.Namespace) -> str:
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    repo, token = options.repo, huggingface_hub.get_token()
    if not token:
        raise UserError(repo, "no token for the hub; set HF_TOKEN to one that may write")
    api = huggingface_hub.HfApi(token=token)
    add = huggingface_hub.CommitOperationAdd
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        api.create_repo(repo, private=options.private or None, exist_ok=True)
        if options.private and not api.model_info(repo).private:
            raise UserError(repo, "is there already and public; make it private first")
        if options.revision:
            api.create_branch(repo, branch=options.revision, exist_ok=True)
        done = api.create_commit(
            repo,
            [add(CARD, text.encode()), *(add(name, str(directory / name)) for name in names)],
            commit_message="Publish a checkpoint",
            revision=options.revision,
        )
    except (http_error(), OSError, RuntimeError) as error:
        status, reason = status_and_reason(error)
        if status == 401:
            problem = "the hub does not accept the token; set HF_TOKEN to a valid one"
        elif status == 403:
            problem = "the hub refuses: this token may not write there; check owner and token"
        else:
            problem = f"upload failed ({reason}); run again"
        raise UserError(repo, problem) from None
    return str(done.commit_url)
