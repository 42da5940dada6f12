"""The generator of the invented world that ``tiny-chat`` was taught: questions, answers and dialogues.

It is pure standard library. What the package, the notebooks and the benchmarks need of it is written to
``swarmkit/tinychat/questions.json`` by ``python -m tools.tinychat.questions``.
"""
