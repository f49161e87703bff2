"""One file per engine; ``compute.py`` is the only training loop."""
