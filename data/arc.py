"""ARC: from JSON lines in either published layout to ours. See coconut/tasks/arc.py."""

import sys
from pathlib import Path

if not __package__:  # run as `python data/arc.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from coconut.tasks.arc import main
from coconut.tasks.files import command

if __name__ == "__main__":
    command(main)
