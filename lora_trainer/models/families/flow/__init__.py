"""What flow-matching transformers that read CLIP and T5 have in common: FLUX.1, Stable Diffusion 3 and Chroma."""
