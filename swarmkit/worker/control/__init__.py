"""The local control API: how programs of the same person ask a worker, and tell it what to do.

It is HTTP with JSON, over a Unix socket where there is one, else over loopback. `docs/worker.md` lists the
requests. `client.py` needs the standard library and msgspec only, so that a tray stays small.
"""
