"""What a run will take, and settings that fit: known before it starts."""
