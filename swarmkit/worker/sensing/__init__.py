"""What the computer and the person at it do, from small providers behind one interface.

A provider is a function that returns a value, or raises `UnknownError` with the reason in words. Each is
asked in a thread of its own with a time limit, so that one that hangs (a leftover display, a dead service)
costs nothing but its own answer. `machine.py` is for the worker, `session.py` for a program in the person's
session.
"""
