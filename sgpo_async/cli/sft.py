"""`sgpo-async sft`: one rank of a supervised warm-up, started by torchrun.

torchrun --nproc-per-node 2 -m sgpo_async.cli sft CONFIG [key=value ...]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from sgpo_async.cli.options import add_config, config_arguments, load_run, print_dry_run, record_config
from sgpo_async.errors import ConfigError
from sgpo_async.installation import under_torchrun
from sgpo_async.processes.torchrun import forget_logs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...] [--dry-run]."""
    add_config(parser)


def run(args: argparse.Namespace) -> int:
    """Train to the end. Raises SgpoError."""
    settings = load_run(args)
    if args.dry_run:
        print_dry_run(settings, [["torchrun", *under_torchrun("sft"), *config_arguments(args)]])
        return 0
    if "RANK" not in os.environ:
        command = " ".join(["torchrun", *under_torchrun("sft"), args.config])
        raise ConfigError(f"sft: RANK is not set; start it by {command}")
    if os.environ["RANK"] == "0":
        from sgpo_async.cli.resources import check_resume, trackers
        from sgpo_async.config.schema import WARMUP_CHECKPOINTS
        from sgpo_async.learner.resume import continues

        trackers(settings)
        check_resume(settings, WARMUP_CHECKPOINTS)
        record_config(
            settings, continues=continues(settings.learner.resume, Path(settings.folder) / WARMUP_CHECKPOINTS)
        )
    from sgpo_async.learner.sft import warm_up

    code = warm_up(settings)
    forget_logs()
    return code
