"""What a user types; `verbs.py` lists it."""
