"""Sessions of clients: admission, steps, and pushes to the next server."""
