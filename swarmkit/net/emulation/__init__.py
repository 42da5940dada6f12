"""Links of a chosen quality, for tests and benchmarks."""
