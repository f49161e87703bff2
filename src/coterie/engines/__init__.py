"""One file per engine, and what they share: ``course.py`` is the only training loop."""
