"""A run: its rounds, its events, its folder, its checkpoints."""
