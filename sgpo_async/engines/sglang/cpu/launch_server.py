"""`sglang.launch_server` with forked processes: `python launch_server.py ARGUMENTS OF SGLANG`.

SGLang spawns its scheduler and its detokenizer, and each imports torch, transformers and SGLang again. This takes 13 of
the 19 CPU seconds until a server answers. CUDA does not allow a fork; on a CPU it is safe, because the main process has
no threads yet, and has imported everything. Run this file by path, in SGLang's own environment.
"""

import multiprocessing
import runpy

_set_start_method = multiprocessing.set_start_method


def _fork(_method: str | None, force: bool = False) -> None:
    """Replaces `multiprocessing.set_start_method`, which SGLang calls with "spawn"."""
    _set_start_method("fork", force)


if __name__ == "__main__":
    multiprocessing.set_start_method = _fork  # type: ignore[assignment]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
