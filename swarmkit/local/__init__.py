"""A swarm on one machine, and its server processes."""
