"""Remote blocks as a differentiable function of whole sequences.

`function.py` is what autograd sees, `call.py` one call forward or back, `flows.py` what becomes of each
micro-batch in it, `exchange.py` one request to one server; `plan.py` decides, and is pure.
"""
