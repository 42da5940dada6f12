"""Speculation: how many tokens to draft before each step, and which generator drafts them."""
