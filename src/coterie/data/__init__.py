"""Clients' rows: files, dataset sources, partitioners, tasks. Knows nothing of models' layers, methods or engines."""
