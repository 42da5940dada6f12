"""Whether outputs of servers can be right, as far as other servers' outputs tell."""
