"""See inside a thought: `lens.py` reads what a checkpoint thinks, the rest shows or counts it."""
