"""Talking to peers: identities, transports, messages, records and the view of the swarm.

Knows nothing of models. Owns the p2p daemon, open streams and the background event loop. Only
`hivemind_transport` and `p2p_daemon` know hivemind, and they are imported late.
"""
