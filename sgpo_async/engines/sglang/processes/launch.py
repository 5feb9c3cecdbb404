"""The command line and the environment of a server, as pure functions."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from sgpo_async.config.schema import Sglang

CPU = Path(__file__).parents[1] / "cpu"
STAND_INS = CPU / "stand_ins"
CPU_LAUNCHER = CPU / "launch_server.py"
LOOPBACK = "127.0.0.1,localhost"
CPU_TOKENS = 2**17  # limits of the key-value cache of a CPU server, which allocates the whole of it when it starts
CPU_CACHE = 2**30  # bytes; a sequence of the greatest length fits nevertheless


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How to launch one server."""

    settings: Sglang
    model: str  # folder
    dtype: str
    device: str  # cpu or cuda
    slots: int  # sequences that it decodes at the same time
    longest: int  # maximum number of tokens of a sequence
    token_bytes: int = 1  # keys and values of one token
    index: int = 0  # number of the server within the actor; it uses tp GPUs from index * tp on
    served_name: str = ""  # model name in requests with text; "": the server takes and returns token ids only

    def command(self, port: int) -> list[str]:
        """The command line. An actor tokenizes by itself, so its servers run without a tokenizer."""
        own = self.settings
        program = [str(CPU_LAUNCHER)] if self.device == "cpu" else ["-m", "sglang.launch_server"]
        command = [own.python, *program, "--model-path", self.model, "--host", "127.0.0.1"]
        command += ["--port", str(port), "--device", self.device, "--dtype", self.dtype]
        command += ["--max-running-requests", str(self.slots), "--tp-size", str(own.tp), "--log-level", "warning"]
        command += ["--incremental-streaming-output", "--stream-interval", str(own.stream_interval)]
        command += ["--served-model-name", self.served_name] if self.served_name else ["--skip-tokenizer-init"]
        if self.device == "cpu":
            # Other processes share memory and cores: limit the cache, and sleep instead of spinning when idle.
            command += ["--sleep-on-idle", "--max-total-tokens", str(self._cpu_tokens())]
        if not own.radix_cache:
            command += ["--disable-radix-cache"]
        return command + shlex.split(own.args)

    def _cpu_tokens(self) -> int:
        """The size of the key-value cache on a CPU, in tokens. SGLang postpones sequences that do not fit."""
        return min(self.slots * self.longest, CPU_TOKENS, max(self.longest, CPU_CACHE // self.token_bytes))

    def environment(self, inherited: dict[str, str] | None = None) -> dict[str, str]:
        """The actor's environment without the variables of its own Python, plus the server's devices and threads."""
        inherited = dict(os.environ) if inherited is None else inherited
        kept = {name: value for name, value in inherited.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        # A server asks itself for its state before it serves, and would do so through the environment's proxy.
        direct = inherited.get("no_proxy") or inherited.get("NO_PROXY")
        kept |= dict.fromkeys(("no_proxy", "NO_PROXY"), f"{direct},{LOOPBACK}" if direct else LOOPBACK)
        if self.device == "cuda":
            visible = inherited.get("CUDA_VISIBLE_DEVICES")
            devices = visible.split(",") if visible else [str(i) for i in range((self.index + 1) * self.settings.tp)]
            own = devices[self.index * self.settings.tp : (self.index + 1) * self.settings.tp]
            return kept | {"CUDA_VISIBLE_DEVICES": ",".join(own)}
        kept |= {
            "SGLANG_USE_CPU_ENGINE": "1",
            "OMP_NUM_THREADS": "1",  # with 2 threads on 2 cores, throughput fell from 2,600 to 40 tokens per second
            "TORCHDYNAMO_DISABLE": "1",
            "PYTHONPATH": str(STAND_INS),
        }
        if self.settings.tp > 1:
            cores = sorted(os.sched_getaffinity(0))
            binding = "|".join(str(cores[rank % len(cores)]) for rank in range(self.settings.tp))
            kept["SGLANG_CPU_OMP_THREADS_BIND"] = binding
        return kept
