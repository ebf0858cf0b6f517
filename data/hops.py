"""Pointer chasing: which concept is so many hops behind a name? See coconut/tasks/suite/hops.py."""

import sys
from pathlib import Path

if not __package__:  # run as `python data/hops.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from coconut.tasks.files import command
from coconut.tasks.suite.hops import main

if __name__ == "__main__":
    command(main)
