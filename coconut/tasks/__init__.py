"""Generators and readers of the questions that a run asks."""
