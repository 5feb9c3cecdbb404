"""Changed YAML files at the reader of configurations."""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random

from sgpo_async.config import load, to_yaml
from sgpo_async.config.builtin import builtin_names, located
from sgpo_async.errors import ConfigError
from sgpo_async.fuzz.mutate import changed_text
from sgpo_async.fuzz.outcome import Record, refusal


def attacks(seed: int, inputs: int, record: Record) -> None:
    """Load `inputs` changed configurations. One that is accepted is the same run after it was written and read."""
    names = [name for name in builtin_names() if "/" not in name]  # the others are those of experiments
    corpus = [located(name).read_text(encoding="utf-8") for name in names]
    with tempfile.TemporaryDirectory() as folder:
        changed, written = Path(folder) / "changed.yaml", Path(folder) / "written.yaml"
        for number in range(inputs):
            random = Random(f"{seed} {number}")
            changed.write_text(changed_text(random.choice(corpus), random), encoding="utf-8")
            try:
                run = load(changed)
            except ConfigError as error:
                record(refusal(error))
                continue
            written.write_text(to_yaml(run), encoding="utf-8")
            assert load(written) == run, "a run must be the same after it was written and read"
            record("accepted")
