"""A federation of organisations: the server, the sites, their keys, and the commands for all of them."""
