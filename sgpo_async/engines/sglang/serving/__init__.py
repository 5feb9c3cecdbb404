"""Requests over a fleet of SGLang servers: assignment, streams, servers that die and come back, weight updates."""
