"""The Python face of both twins: load, generate, think, evaluate, train (docs/python.md).

What the commands do, without a command line: errors are `UserError`, nothing is printed. Opening
this module imports nothing heavy, so `import mlx_coconut` costs no start-up time.
"""

from __future__ import annotations

import argparse
import html
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coconut.errors import UserError
from coconut.files import here_or_shipped, read_json, write_text
from coconut.world import World

if TYPE_CHECKING:
    import numpy as np

    from coconut.backend import MakeBackend
    from coconut.inside.findings import Inspection
    from coconut.inside.graph import Graph
    from coconut.inside.lens import Lens

HEIGHT = 800
"""Pixels of the page in a notebook; it scrolls."""


@dataclass(frozen=True)
class Face:
    """What is bound to one twin: `load` and `train`. The other verbs take what `load` gave."""

    twin: str
    make_backend: MakeBackend

    def load(
        self, model: str | Path, *, latents: int | None = None, base: str | Path | None = None
    ) -> Lens:
        """Open a checkpoint: the name of a shipped model, a directory, or a name on the hub.

        latents: thoughts it is asked with; None are the checkpoint's own. base: where an adapter's
        base is, if it was moved. Raises UserError: nothing there, damaged, or a method that has no
        thoughts and latents for it.
        """
        from coconut.inside.lens import Lens

        return Lens(model, self.make_backend, latents, None if base is None else str(base))

    def train(
        self, config: str | Path | Mapping[str, Any], *, verbose: bool = False, **keys: Any
    ) -> Run:
        """Do the run that a configuration asks for, in this process: training, or `only_eval`.

        config: a YAML file, or its keys as a mapping. keys: in place of the configuration's own
        (docs/keys.md); a key of a group by the whole group, `lora={"rank": 4}`. verbose: print the
        lines that the command prints. A run that was begun goes on. Raises UserError with all that
        is wrong with the keys, before any model is built.
        """
        from coconut.commands.run import start_run
        from coconut.config.reading import load_config
        from coconut.reporting.console import silenced

        # JSON is YAML, so a key is read and checked as the command's `key=value` is.
        overrides = [
            f"{name}={json.dumps(value, ensure_ascii=False, default=str)}"
            for name, value in keys.items()
        ]
        checked = load_config(config, overrides)
        with silenced(not verbose):
            start_run(checked, self.make_backend, self.twin, World())
        return Run(checked.run_dir)


@dataclass(frozen=True)
class Run:
    """A run that was done. directory: what it wrote (docs/runs.md)."""

    directory: Path

    @property
    def summary(self) -> dict[str, Any] | None:
        """The last evaluation, as summary.json has it; None if there was none."""
        path = self.directory / "summary.json"
        return read_json(path) if path.exists() else None

    @property
    def checkpoint(self) -> Path | None:
        """The newest checkpoint, for `load`; None if none was saved."""
        from coconut.commands.run import newest_of

        return newest_of(self.directory)


@dataclass(frozen=True, repr=False)
class Thoughts:
    """What a model thought about a question; a notebook shows it as the page of `inspect`.

    The arrays are float32, for n thoughts, or None if there are none. states (n, D): behind the
    final norm, in the column before each latent. vectors (n, D): the thoughts, which the latents
    receive. logprobs (n, V): the states through the output head, nats. attention (n, L, H, T): from
    each latent to every column of the prompt, by layer and head; sums to 1.
    found: what `inspect --json` prints, as objects.
    """

    lens: Lens
    found: Inspection
    reading: str | None
    states: np.ndarray | None = None
    vectors: np.ndarray | None = None
    logprobs: np.ndarray | None = None
    attention: np.ndarray | None = None

    @property
    def top(self) -> list[list[tuple[str, float]]]:
        """Of each thought the most probable tokens, if the output head reads it."""
        return [thought.top for thought in self.found.thoughts]

    @property
    def answers(self) -> list[str]:
        """The answers after 0, 1, ..., n thoughts; empty where it gave none."""
        return [stop.answer for stop in self.found.stops]

    @property
    def graph(self) -> Graph | None:
        """The graph that the question speaks of; None if it is not of ProsQA's form."""
        return self.found.graph

    def page(self) -> str:
        """The page of `inspect`: HTML that needs nothing else and opens from disk."""
        from coconut.inside.page.page import page

        return page(self.lens, self.lens.backend.name, [self.found], kind=self.reading)

    def __repr__(self) -> str:
        lines = [f"after {k}: {text or '(no answer)'}" for k, text in enumerate(self.answers)]
        return "\n".join([f"{len(self.top)} thoughts", *lines])

    def _repr_html_(self) -> str:
        # In a frame, and one without an origin: nothing of page and notebook meets.
        return (
            f'<iframe sandbox="allow-scripts" style="width: 100%; height: {HEIGHT}px; border: 0"'
            f' srcdoc="{html.escape(self.page())}"></iframe>'
        )


def generate(
    model: Lens,
    questions: str | Sequence[str],
    *,
    latents: int | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
) -> str | list[str]:
    """Answer questions, as `generate` does: a text gives a text, a sequence a list in its order.

    latents: thoughts; None as the model was loaded. temperature: 0 is greedy. seed: of the draws.
    Warns of answers cut where the model's positions end. Raises UserError: a number too low,
    a question that is empty or too long.
    """
    from coconut.commands.generate import answers

    given: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    given |= {"seed": seed, "batch_size": batch_size}
    _check(latents=latents, **given)
    asked = [questions] if isinstance(questions, str) else list(questions)
    found = list(answers(model.with_thoughts(latents), asked, **given))
    if cut := sum(answer.cut for answer in found):
        n = model.backend.n_positions
        warnings.warn(f"answers cut where the model's {n} positions end: {cut}", stacklevel=2)
    texts = [answer.text for answer in found]
    return texts[0] if isinstance(questions, str) else texts


def think(
    model: Lens,
    question: str,
    *,
    latents: int | None = None,
    answer: str | None = None,
    top: int = 10,
    max_new_tokens: int = 64,
    reading: str | None = None,
) -> Thoughts:
    """Look into the thoughts about one question, as `inspect` does.

    answer: the right one, if it does not follow from the question. top: tokens a read-out names.
    reading: the tree that the page shows first, see READINGS of `inside.findings`; else by method.
    Raises UserError: a number that is too low, an unknown reading, a question that is empty or too
    long.
    """
    from coconut.inside.findings import READINGS

    _check(latents=latents, max_new_tokens=max_new_tokens, top=top)
    if reading is not None and reading not in READINGS:
        raise UserError("reading", f"expected one of {', '.join(READINGS)}, got {reading!r}")
    lens = model.with_thoughts(latents)
    found = lens.inspect(question, answer, n_top=top, max_new_tokens=max_new_tokens)
    trace = lens.trace(question)
    if trace is None:
        return Thoughts(lens, found, reading)
    arrays = (trace.states, trace.thoughts, trace.logprobs, trace.attention)
    return Thoughts(lens, found, reading, *arrays)


def evaluate(
    model: Lens,
    data: str | Path | Sequence[Mapping[str, Any]],
    *,
    latents: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    stage: int | None = None,
    swap_test: bool = True,
) -> dict[str, Any]:
    """Answer every item once and count, as a run with `only_eval` does. Returns its summary.json.

    data: a JSON file of items (question, answer, steps), here or one that ships, or the items.
    latents: None are those of the model as it was loaded. The others stand for the keys of a run
    (docs/keys.md), batch_size for eval_batch_size; the noise of a feedback rule keeps the seed 0
    that the model was opened with. Raises UserError for what is wrong with numbers or items, and
    for a model trained over a data set, whose runs `train` does.
    """
    from coconut.commands.run import start_run
    from coconut.config.keys import RunConfig
    from coconut.config.methods import DATASET_METHODS
    from coconut.config.reading import check_config
    from coconut.reporting.console import silenced

    keys: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    keys |= {"seed": seed, "stage": stage}
    _check(latents=latents, batch_size=batch_size, **keys)
    lens = model.with_thoughts(latents)
    if (method := lens.config.method) in DATASET_METHODS:
        raise UserError(
            str(lens.directory),
            f"was trained by {method} over a data set; evaluate it by train(..., only_eval=True)",
        )
    keys |= {"n_latents": lens.given_thoughts, "eval_batch_size": batch_size}
    is_file = isinstance(data, str | Path)
    with tempfile.TemporaryDirectory() as folder, silenced():
        if isinstance(data, str | Path):
            path = here_or_shipped(str(data))
        else:
            path = f"{folder}/items.json"
            write_text(Path(path), json.dumps(list(data)))
            # Of a file its name decides.
            keys["max_new_tokens"] = max_new_tokens or RunConfig().new_tokens
        keys |= {"val_path": path, "save_path": folder, "swap_test": swap_test}
        try:
            config = check_config(vars(lens.config) | keys, "evaluate")
            start_run(config, lambda *_, world: lens.backend, lens.backend.name, World())
        except UserError as error:
            where = error.where if is_file else error.where.replace(path, "items")
            raise UserError(where, *error.problems) from None
        summary = read_json(config.run_dir / "summary.json")
    return summary if is_file else summary | {"data": None}


def _check(**given: float | None) -> None:
    """Raise UserError for numbers that are below their least value."""
    from coconut.checkpoints.named import too_low
    from coconut.commands.generate import LEAST

    least = {name: low for name, low in (LEAST | {"top": 1, "stage": 0}).items() if name in given}
    if problems := too_low(argparse.Namespace(**given), "", **least):
        raise UserError("arguments", *problems)
