"""`cuda-coconut VERB ...`, the same as `python -m cuda_coconut VERB ...`: every verb, in torch."""

from cuda_coconut.run import main

if __name__ == "__main__":
    main()
