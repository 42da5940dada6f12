"""Has logits computed by servers where this is quicker, and keeps `generate()` exact."""
