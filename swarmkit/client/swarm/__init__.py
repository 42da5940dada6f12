"""What all sessions of one model share: the connection, the view of the swarm and the search for routes."""
