"""Serves the clients' models of a run over HTTP: one base, every client's bank, and OpenAI's routes."""
