"""Pictures of a run's LoRAs in a grid: saved steps by weights by prompts, the base model in the first column."""
