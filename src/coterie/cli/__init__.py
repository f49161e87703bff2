"""What is typed: the commands, and how they show progress."""
