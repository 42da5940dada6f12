"""The worker: lends this machine to a swarm in the background, within limits, and gets out of the way.

Three processes, each with its own task::

    tray (the person's session) ── senses, shows, asks        swarmkit_app/tray, or `swarmkit worker ...`
         │ local control API: a lease with signals, requests
    worker ── decides, supervises                              BackgroundWorker.run; never imports torch
         │ standard input and output: limits, reports
    node process ── computes                                   `node_process.py`: a `Node` with a server

The worker keeps the person's settings and what was contributed. Whether it may serve, and within which
limits, is one pure function of signals and settings (`policy.py`), whose answer carries its reason in words.
Where it may not, no node process exists, and so neither does memory of a GPU that belongs to one.
"""
