"""Slow, plain transcriptions of the published equations: what the tests compare against."""
