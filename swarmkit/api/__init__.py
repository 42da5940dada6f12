"""The HTTP API: OpenAI's and Anthropic's wire formats in front of a model of a swarm.

`engine.py` runs `model.generate()` for each request in a thread, and `dialects/` translates between what it
tells and what each format wants. `app.py` makes the application, `serving.py` serves it.
"""
