"""`python -m TWIN.publish DIR --repo OWNER/NAME`: a checkpoint and its model card -> the hub."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from coconut.adapters import is_adapter
from coconut.checkpoint import (
    CHECKSUMS,
    FEEDBACK,
    describe,
    read_bytes,
    read_json,
    verify,
    weight_files,
)
from coconut.cli import guarded
from coconut.errors import UserError
from coconut.hub import DESCRIPTION, http_error

CARD, SUMMARY = "README.md", "summary.json"
MEASURED = ("n", "accuracy", "swapped_accuracy", "both_accuracy", "maj_k", "maj_accuracy", "split")


def main(twin: str, argv: Sequence[str] | None = None) -> None:
    """Publish one checkpoint; what the user can mend ends with one message and status 2."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {twin}.publish", description="Upload a checkpoint with a model card."
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="checkpoint")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="repository")
    parser.add_argument("--summary", metavar="FILE", type=Path, help="results (the run's own)")
    parser.add_argument("--dry-run", action="store_true", help="show card and files, send nothing")
    parser.add_argument("--private", action="store_true", help="a private repository")
    parser.add_argument("--revision", metavar="BRANCH", help="branch (main); made if missing")
    guarded(lambda: publish(parser.parse_args(argv)))


def publish(options: argparse.Namespace) -> None:
    """Check the checkpoint, write its card, then upload both in one commit."""
    from huggingface_hub import errors
    from huggingface_hub.utils import validate_repo_id

    directory, repo = options.directory, options.repo
    try:
        validate_repo_id(repo)
        is_valid = repo.count("/") == 1
    except errors.HFValidationError:
        is_valid = False
    if not is_valid:
        raise UserError(repo, "not a valid hub name; give --repo OWNER/NAME")
    # First of all: an adapter lacks the files that the checks of a whole checkpoint ask for.
    if directory.is_dir() and is_adapter(directory):
        raise UserError(str(directory), "holds an adapter only; fuse it first (TWIN.fuse DIR OUT)")
    names = files_of(directory)
    text = card(directory, repo, options.revision, options.summary)
    if options.dry_run:
        print(text)
        for name in names:
            print(f"{(directory / name).stat().st_size:>14,}  {name}")
        print(f"{len(text.encode()):>14,}  {CARD}")
        return
    print(f"wrote {_upload(directory, names, text, options)}")


def files_of(directory: Path) -> list[str]:
    """Names of what coconut.hub fetches again: no optimizer or trainer state, no checksums."""
    describe(directory)
    if (directory / CHECKSUMS).exists():
        verify(directory)
    described = [name for name in (*DESCRIPTION, FEEDBACK) if (directory / name).is_file()]
    return list(dict.fromkeys([*described, *weight_files(directory)]))


def card(directory: Path, repo: str, revision: str | None, summary: Path | None) -> str:
    """The model card; results that nobody measured are said to be so.

    Raises UserError: a named summary that is missing or damaged.
    """
    run_dir = directory.resolve().parent
    made_with = describe(directory)["coconut"] or {}
    settings: dict[str, Any] = {}
    if (run_dir / "config.yaml").is_file():
        try:
            settings = yaml.safe_load(read_bytes(run_dir / "config.yaml"))
        except yaml.YAMLError:
            raise UserError(str(run_dir / "config.yaml"), "not YAML; repair or move it") from None
        if not isinstance(settings, dict):
            raise UserError(str(run_dir / "config.yaml"), "expected keys and values")
    found = summary or run_dir / SUMMARY
    results = read_json(found) if summary or found.is_file() else {}
    measured = [f"| {name} | {results[name]} |" for name in MEASURED if name in results]
    table = ["| measure | value |", "| --- | --- |", *measured] if measured else ["Not measured."]
    base = settings.get("model_id")
    # A directory's path is nobody else's business.
    named = Path(base).name if base and Path(base).exists() else base
    facts = {
        "Base model": named or ("none (from scratch)" if settings else "not recorded"),
        "Data": Path(settings["train_path"]).name if settings.get("train_path") else "not recorded",
        "Method": made_with.get("method", "not recorded"),
        "Feedback rule": json.dumps(made_with.get("feedback", "not recorded")).strip('"'),
        "Stage": made_with.get("stage", "not recorded"),
    }
    branch = f" --revision {revision}" if revision else ""
    head = {"library_name": "mlx-coconut", "tags": ["coconut", "latent-reasoning"]}
    if base and named == base:
        head["base_model"] = base
    lines = ["---", yaml.safe_dump(head).strip(), "---", f"# {repo}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "## Results", "", *table, "", "## Use", "", "```"]
    lines.append(f"hf download {repo}{branch} --local-dir model")
    for twin in ("mlx_coconut", "cuda_coconut"):
        lines.append(f"python -m {twin}.run ARGS.yaml only_eval=true load_model_path=model")
    lines += ["```", "", "## Licence", ""]
    lines.append("The weights follow the terms of base model and data; the program is MIT.")
    return "\n".join(lines) + "\n"


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
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            problem = "the hub does not accept the token; set HF_TOKEN to a valid one"
        elif status == 403:
            problem = "the hub refuses: this token may not write there; check owner and token"
        else:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            problem = f"upload failed ({reason}); run again"
        raise UserError(repo, problem) from None
    return str(done.commit_url)
