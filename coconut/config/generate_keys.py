"""The keys under `generate`: training data made as it is needed, and the options of its task."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields, make_dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from coconut.config.values import key, read_keys, shown, word
from coconut.errors import UserError
from coconut.tasks.generated import of_epoch
from coconut.tasks.makers import TASKS, maker

_key = partial(key, group="generate")


@dataclass(frozen=True)
class Generate:
    """The keys under `generate` that every task has."""

    task: str = _key(next(iter(TASKS)), "what is made", choices=tuple(TASKS))
    items: int = _key(None, "how many items to make; must be given", low=1)
    fresh: bool = _key(
        False,
        "other items each epoch; an option may then be a list, a value an epoch, the last of which"
        " stays",
    )
    seed: int = _key(None, "the same seed makes the same items; otherwise the run's", low=0)


def options_of(task: str) -> type[Any]:
    """A task's options as keys: their help is the docstring under each field of its `Options`."""
    kind = maker(task).Options
    source: Any = ast.parse(inspect.getsource(kind)).body[0]
    helps = {
        ast.unparse(line.target): " ".join(below.value.value.split())
        for line, below in pairwise(source.body)
        if isinstance(line, ast.AnnAssign)
    }
    described = [(f.name, f.type, _key(f.default, helps[f.name])) for f in fields(kind)]
    return make_dataclass(kind.__name__, described)


def generate_problems(given: Mapping[str, Any]) -> list[str]:
    """What is wrong with the keys under `generate`."""
    if not given:
        return []
    task = given.get("task", Generate.task)
    options = maker(task if task in tuple(TASKS) else Generate.task).Options
    names = {f.name for f in fields(options)}
    found, wrong = read_keys(Generate, given, names)
    if "task" in wrong:
        return [f"generate.task: {wrong['task']}"]
    problems = [f"generate.{word(name)}: {text}" for name, text in wrong.items()]
    values = {name: value for name, value in given.items() if name in names}
    for name, value in list(values.items()):
        each = value if isinstance(value, list) else [value]
        if huge := [v for v in each if isinstance(v, int) and abs(v) >= 2**53]:
            problems.append(f"generate.{name}: too large: {shown(huge[0])}")
            del values[name]
    if "items" not in given:
        problems.append("generate.items: missing; how many items to make")
    lists = {name: value for name, value in values.items() if isinstance(value, list)}
    for name, value in lists.items():
        if not value:
            problems.append(f"generate.{name}: the list is empty")
        elif not found.get("fresh"):
            problems.append(f"generate.{name}: a list, a value an epoch, needs fresh: True")
    if not all(lists.values()):
        return problems
    for epoch in range(max(map(len, lists.values()), default=1)):
        try:
            of_epoch(options, values, epoch)
        except UserError as error:
            problems += [f"generate.{problem}" for problem in error.problems]
    return list(dict.fromkeys(problems))
