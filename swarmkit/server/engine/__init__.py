"""The device's thread, and the decisions about what it computes next."""
