"""`make bench`: this code against the published way and against transformers, in one run."""
