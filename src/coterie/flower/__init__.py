"""Flower, all of it: the only folder that imports flwr and ray."""
