"""Keys that have other values now than where a run that goes on was last started."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from coconut.config.keys import NOT_KEPT, RunConfig
from coconut.config.reading import read_yaml
from coconut.config.values import shown
from coconut.errors import UserError

SETTINGS = "config.yaml"


def settings_of(run_dir: Path) -> dict[str, Any]:
    """What a run directory's config.yaml holds; {} if there is none. Raises UserError."""
    path = run_dir / SETTINGS
    try:
        return read_yaml(path) if path.exists() else {}
    except UserError as error:
        raise UserError(
            str(path),
            f"{error.problems[0]}; put it back, or move it away: it is written anew, without"
            " telling which keys have changed",
        ) from None


def changed_keys(config: RunConfig, goes_on_from: Path | None) -> dict[str, dict[str, Any]]:
    """Key -> its value `was` and `now`, of those that differ from config.yaml.

    goes_on_from: a checkpoint; nothing has changed unless it is one of the run's own. Raises
    UserError if one says what the run is, and resume_changed does not allow it.
    """
    own = goes_on_from is not None and goes_on_from.parent == config.run_dir
    before = settings_of(config.run_dir) if own else {}
    if not before or before.get("only_eval"):
        return {}
    others = type(config)()
    kept = [f for f in fields(config) if f.name not in NOT_KEPT]
    values = {
        f.name: (before.get(f.name, getattr(others, f.name)), getattr(config, f.name)) for f in kept
    }
    changed = {n: {"was": was, "now": now} for n, (was, now) in values.items() if was != now}
    refused = [f.name for f in kept if f.name in changed and f.metadata["identity"]]
    if refused and not config.resume_changed:
        problems = [f"{goes_on_from} was trained with {_in_words(n, changed[n])}" for n in refused]
        problems[-1] += (
            "; put back what was, choose another name for a new run, or set resume_changed: True"
        )
        raise UserError(config.where, *problems)
    return changed


def changed_lines(changed: dict[str, dict[str, Any]]) -> list[str]:
    """A line a key."""
    return [f"changed: until now {_in_words(*item)}" for item in changed.items()]


def _in_words(name: str, values: dict[str, Any]) -> str:
    return f"{name} {shown(values['was'])}, not {shown(values['now'])}"
