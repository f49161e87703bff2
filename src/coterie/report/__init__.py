"""What is shown: the page of a run, its tables and pictures."""
