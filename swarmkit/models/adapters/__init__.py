"""LoRA adapters and deep prompts: their values, their files, and the hooks that apply them in a forward
pass.
"""
