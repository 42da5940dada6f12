"""Programs with a face of their own, on top of swarmkit: the playground."""
