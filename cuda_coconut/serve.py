"""`python -m cuda_coconut.serve --model DIR`: the live page of inspect, on this machine."""

from __future__ import annotations

from coconut.inside.page.serve import main
from cuda_coconut.run import make_backend

if __name__ == "__main__":
    main("cuda_coconut", make_backend)
