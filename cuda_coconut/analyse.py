"""`python -m cuda_coconut.analyse WHAT --model DIR`: what thoughts do over a data set, in torch."""

from __future__ import annotations

from coconut.inside.analyse import main
from cuda_coconut.run import make_backend

if __name__ == "__main__":
    main("cuda_coconut", make_backend)
