"""What a run shows: console, log, curves, report."""
