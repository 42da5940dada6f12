"""Swarms in virtual time: thousands of servers that come and go, and clients whose requests they answer.

What decides is the package's own code: clients route, wait and ban with `SwarmClient` and `RouteSearch`,
servers place themselves with `swarmkit.placement`, lease cache from a `KVBudget` and refuse with
`AdmissionControl`. Only what takes time is replaced: the network and the computing, whose durations follow
from hardware and distances.
"""
