"""The keys of a run: what each is, reading, checking and describing them."""
