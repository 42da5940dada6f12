"""Decisions about which servers to use; pure functions and small classes over plain data."""
