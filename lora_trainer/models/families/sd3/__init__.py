"""Stable Diffusion 3 and 3.5: flow-matching transformers that read two CLIPs and, where it is there, T5."""
