"""Measuring a swarm: the numbers that we quote come from here.

Speed is measured as ratios within one run, against the local model with the same threads, because machines
differ and drift. Results go to `benchmarks/results/` with date, machine and command.
"""
