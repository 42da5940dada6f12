"""Decode steps that were compiled for a CPU; see `steps`."""
