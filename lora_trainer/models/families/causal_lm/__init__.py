"""Causal language models: transformers builds the frozen network and the tokenizer, and nothing else."""
