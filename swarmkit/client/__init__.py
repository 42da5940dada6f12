"""Using blocks that others serve.

`SwarmModelForCausalLM` is the door. `routing`, `bans` and `deadline` decide (pure); `chain` is the session:
one stream per server of the route, the history that survives them, and recovery; `swarm` is what all sessions
of a model share; `remote_blocks` is the module that stands in the Hugging Face model where its blocks were.
Never imports `swarmkit.server`.
"""
