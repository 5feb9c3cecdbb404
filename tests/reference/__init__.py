"""Slow, plain transcriptions of the published equations, which the tests use as references."""
