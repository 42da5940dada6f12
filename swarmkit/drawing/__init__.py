"""Pictures of a swarm, as SVG, HTML tables and plain text: pure functions over plain values."""
