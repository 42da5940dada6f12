"""The memory for keys and values: its budget, and the pages that are kept for sessions that begin alike."""
