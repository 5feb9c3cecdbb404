"""Serves requests on a fleet of SGLang servers: assigns requests, restarts servers that die, updates weights."""
