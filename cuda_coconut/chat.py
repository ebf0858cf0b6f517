"""`python -m cuda_coconut.chat --model DIR`: a conversation with a checkpoint in torch."""

from __future__ import annotations

from coconut.inside.chat import main
from cuda_coconut.run import make_backend

if __name__ == "__main__":
    main("cuda_coconut", make_backend)
