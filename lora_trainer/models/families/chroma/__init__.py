"""Chroma: FLUX.1 without CLIP and guidance, whose modulations one small network makes for all blocks."""
