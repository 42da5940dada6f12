"""The parts of an architecture, what it needs beyond being cut, and language models inside other models."""
