"""A real federation: the server, the sites, their keys, and what they agree on."""
