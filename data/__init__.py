"""Builders of the data sets: each module reads or makes one set and writes a JSON list of items."""
