"""The precision in which blocks are kept and computed, and checkpoints whose weights are stored
quantised.
"""
