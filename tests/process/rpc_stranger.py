"""A process without a session's secret that takes the place of its weight receiver, as far as it gets.

Arguments: PORT of the rendezvous, FOLDER. It writes FOLDER/tried when it begins. If it can make the weight sender
unpickle a value, this creates FOLDER/made.
"""

import os
import sys
import threading
from pathlib import Path
from typing import Any

os.environ["TP_SOCKET_IFNAME"] = os.environ["GLOO_SOCKET_IFNAME"] = "lo"

from torch.distributed import rpc

PORT, FOLDER = sys.argv[1], Path(sys.argv[2])
LAST_S = 240.0


class Bomb:
    """Its pickle creates a folder when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(FOLDER / "made"),)


threading.Timer(LAST_S, os._exit, [3]).start()
(FOLDER / "tried").touch()
options = rpc.TensorPipeRpcBackendOptions(init_method=f"tcp://127.0.0.1:{PORT}", rpc_timeout=LAST_S, _transports=["uv"])
rpc.init_rpc("weight_receiver", rank=1, world_size=2, rpc_backend_options=options)
rpc.rpc_sync("weight_sender", print, args=(Bomb(),))
os._exit(0)
