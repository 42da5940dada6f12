"""A session over a chain of servers: its steps, its recovery and its caches."""
