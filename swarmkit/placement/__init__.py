"""Which server serves which blocks, and how much memory it leaves for sessions: decisions over plain data.

`description.py` says what a decision is made of; `petals.py` is the rule of Petals and `choice.py` ours, for
a server that decides by itself; `supply.py` and `latency.py` say what a placement is worth. Knows nothing of
peers, models or torch.
"""
