"""Requests and answers over a transport's streams."""
