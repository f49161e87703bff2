"""The settings of a run: one TOML file, checked once."""
