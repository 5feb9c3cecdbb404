"""Extracts strategies from a stronger model's responses: problem type, approach and general steps, without leaks.

    problem + response ─▶ 5 candidates ─▶ parse ─▶ leak check ─▶ deduplicate ─▶ ranking ─▶ write the best to the library
                          prompts.py      parse.py  leaks.py                      prompts.py   library.py
                          endpoint.py (any OpenAI-compatible server)           journal.py: every reply, immediately

Pure functions: parse.py, leaks.py, values.py, candidates.py. I/O: endpoint.py, journal.py. pipeline.py combines them.
"""

from sgpo_async.strategies.endpoint import Endpoint, Server
from sgpo_async.strategies.journal import Journal
from sgpo_async.strategies.leaks import leaks
from sgpo_async.strategies.library import check, write_library
from sgpo_async.strategies.pipeline import Pipeline

__all__ = ["Endpoint", "Journal", "Pipeline", "Server", "check", "leaks", "write_library"]
