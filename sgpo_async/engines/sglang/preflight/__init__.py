"""What a server must show before it may take work: at join in under a second, and for `sgpo-async doctor` in full.

findings.py    subject, findings, errors with a remedy
settings.py    version, interface, what the server was started with: literal tables
model.py       architecture, vocabulary, names and shapes
logprobs.py    what its log-probabilities mean
updates.py     weights in and back, generation across a pause
examine.py     the tables of checks; `join`, `examine`
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
