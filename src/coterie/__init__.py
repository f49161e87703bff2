"""Coterie: federated fine-tuning of Hugging Face language models with mixtures of LoRA experts."""

__version__ = "0.1.0"
