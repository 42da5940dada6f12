"""Training requests: forward and backward passes over full sequences."""
