"""Tools on finished LoRA files: each reads files and writes a new one; nothing is changed in place."""
