"""One process in a swarm: one identity, one transport and one event loop for everything that it does there.

`Node` owns the transport and the registry, and hands them to its parts: servers of models, and clients.
`Server` is the synchronous face of a node that serves one model.
"""
