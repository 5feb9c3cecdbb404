"""How a server is started: command line and environment, as pure functions."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from sgpo_async.config.schema import Sglang

CPU = Path(__file__).parents[1] / "cpu"
STAND_INS = CPU / "stand_ins"
CPU_LAUNCHER = CPU / "launch_server.py"
CPU_TOKENS = 2**17  # of keys and values, at most


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One server, of an actor or of texts."""

    settings: Sglang
    model: str  # folder
    dtype: str
    device: str  # cpu or cuda
    slots: int  # sequences that it decodes together
    longest: int  # tokens of a sequence
    index: int = 0  # which of the actor's servers: it has GPUs index * tp onwards
    known_as: str = ""  # under this name it takes and gives texts as well; "": token ids only

    def command(self, port: int) -> list[str]:
        """The command line. An actor's token ids are its own, so the server needs no tokenizer and decodes no text."""
        own = self.settings
        program = [str(CPU_LAUNCHER)] if self.device == "cpu" else ["-m", "sglang.launch_server"]
        words = [own.python, *program, "--model-path", self.model, "--host", "127.0.0.1"]
        words += ["--port", str(port), "--device", self.device, "--dtype", self.dtype]
        words += ["--max-running-requests", str(self.slots), "--tp-size", str(own.tp), "--log-level", "warning"]
        words += ["--incremental-streaming-output", "--stream-interval", str(own.stream_interval)]
        words += ["--served-model-name", self.known_as] if self.known_as else ["--skip-tokenizer-init"]
        if self.device == "cpu":
            # Memory and cores are shared with everybody: no pool that fills it, no idle spinning.
            words += ["--sleep-on-idle", "--max-total-tokens", str(min(self.slots * self.longest, CPU_TOKENS))]
        if not own.radix_cache:
            words += ["--disable-radix-cache"]
        return words + shlex.split(own.args)

    def environment(self, inherited: dict[str, str] | None = None) -> dict[str, str]:
        """The environment: the actor's, less what belongs to its own Python."""
        inherited = dict(os.environ) if inherited is None else inherited
        kept = {name: value for name, value in inherited.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        if self.device == "cuda":
            visible = inherited.get("CUDA_VISIBLE_DEVICES")
            devices = visible.split(",") if visible else [str(i) for i in range((self.index + 1) * self.settings.tp)]
            own = devices[self.index * self.settings.tp : (self.index + 1) * self.settings.tp]
            return kept | {"CUDA_VISIBLE_DEVICES": ",".join(own)}
        kept |= {
            "SGLANG_USE_CPU_ENGINE": "1",
            "OMP_NUM_THREADS": "1",  # with two on two cores, throughput fell from 2,600 to 40 tokens a second
            "TORCHDYNAMO_DISABLE": "1",
            "PYTHONPATH": str(STAND_INS),
        }
        if self.settings.tp > 1:
            cores = sorted(os.sched_getaffinity(0))
            binding = "|".join(str(cores[rank % len(cores)]) for rank in range(self.settings.tp))
            kept["SGLANG_CPU_OMP_THREADS_BIND"] = binding
        return kept
