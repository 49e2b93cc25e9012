"""FLUX.1: a flow-matching transformer that reads T5 and CLIP."""
