"""Checkpoints in and out: every known layout to our directory, and back to the published one."""
