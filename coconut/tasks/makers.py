"""The tasks that a run can generate questions of."""

import importlib
from typing import Any

TASKS = {"prosqa": "coconut.tasks.prosqa", "hops": "coconut.tasks.suite.hops"}
"""What `generate` can make, and the file that makes it; the first is the default."""


def maker(task: str) -> Any:
    """The module that makes items of a task, with `Options`, `generate` and `keys`."""
    return importlib.import_module(TASKS[task])
