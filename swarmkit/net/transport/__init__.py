"""The one seam to the network, its in-memory body for tests, and the identity of a peer."""
