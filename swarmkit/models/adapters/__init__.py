"""LoRA adapters and deep prompts: their values, files, and the hooks that apply them in a forward pass."""
