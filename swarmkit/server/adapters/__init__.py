"""Adapters that clients send, and those that a server hosts."""
