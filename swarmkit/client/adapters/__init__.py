"""Adapters inside remote blocks, and PEFT's entry points to them."""
