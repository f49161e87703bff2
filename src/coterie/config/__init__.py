"""What a run is asked to be: one TOML file, checked once."""
