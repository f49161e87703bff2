"""The bank layer, its gates, and how they attach to a Hugging Face model."""
