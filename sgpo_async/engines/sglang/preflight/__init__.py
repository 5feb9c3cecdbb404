"""Checks of a server before it gets requests: some when it joins (under a second), all for `sgpo-async doctor`.

findings.py    the server under test, findings, errors with a remedy
settings.py    version, HTTP API and launch options, compared with literal tables
model.py       architecture, vocabulary, names and shapes of the server's model
logprobs.py    the distribution that its log-probabilities belong to
updates.py     weight updates, generation across a pause, clock
examine.py     the tables of checks; `join` and `examine` run them
"""

from sgpo_async.engines.sglang.preflight.examine import FULL, JOIN, examine, join
from sgpo_async.engines.sglang.preflight.findings import (
    Finding,
    Reference,
    Subject,
    finding_of,
)

__all__ = [
    "FULL",
    "JOIN",
    "Finding",
    "Reference",
    "Subject",
    "examine",
    "finding_of",
    "join",
]
