"""`python -m mlx_coconut.publish DIR --repo OWNER/NAME`: upload a checkpoint with its card."""

from __future__ import annotations

from coconut.commands.publish import main

if __name__ == "__main__":
    main("mlx_coconut")
