"""Numerics on tensors and arrays, and nothing else."""
