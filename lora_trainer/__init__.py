"""Train LoRA adapters for Stable Diffusion: inside a WebUI that lends its model, or from the command line."""

__version__ = "0.1.0"
