"""Hostile input on purpose: valid inputs, changed at random, and whether each is refused as it should be.

    sgpo-async fuzz [TARGET ...] [--seed S] [--inputs N]

    codec         messages                 WireError, or the message that the frames hold, which encodes again
    hub           messages at a hub        a rejection by name; the ledger agrees and the others' run goes on
    checkpoint    folders of checkpoints   CheckpointError, or the parameters that were saved
    configuration YAML files               ConfigError, or a run that survives being written and read

Each input depends only on the seed and its number, those of `hub` also on the simulated run, which the seed determines,
too. So the same command repeats a finding: any other exception, an error that is not one line, or memory that grows
beyond a limit.
"""

from sgpo_async.fuzz.run import run_fuzz

__all__ = ["run_fuzz"]
