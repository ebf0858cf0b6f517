"""ProsQA: fresh items from a seed, and statistics of files. See coconut/tasks/prosqa.py."""

import sys
from pathlib import Path

if not __package__:  # run as `python data/prosqa.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from coconut.tasks.files import command
from coconut.tasks.prosqa_command import main

if __name__ == "__main__":
    command(main)
