"""What a loaded model answers: rows in; labels, texts or choices out."""
