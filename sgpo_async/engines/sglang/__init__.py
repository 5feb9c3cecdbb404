"""SGLang servers as one engine: launched or attached, streamed from over HTTP, updated in flight and verified.

    engine.py     the engine: a thread that runs an asyncio loop, and the methods that call into the loop

    processes/    how servers are started and how HTTP requests reach them
                  launch.py   command line and environment         process.py   the processes of one server
                  api.py      HTTP requests with timeouts
    serving/      requests, weight updates and supervision of all servers of an actor
                  fleet.py    starts, supervises and updates all servers
                  requests.py assigns requests to servers           quarantine.py   finds requests that kill servers
                  server.py   the streams of one server             partial.py      a completion that grows
                  update.py   one verified weight update            server_slot.py  where one server runs
                  texts.py    a server that takes and returns text, for the strategies command
    weight_sync/  how a weight version reaches a server, and how its arrival is verified
                  transports.py   tensors over HTTP, broadcast, disk
                  layout.py       the parameters that a server must then have
                  tensor_hash.py  SGLang's checksums                model_facts.py   names, shapes, limits of a model
    preflight/    checks that a server must pass before it gets requests; also `sgpo-async doctor`
    cpu/          launcher and stand-in packages for servers on a CPU

No module imports sglang: the servers run in a Python environment of their own.
"""

from sgpo_async.engines.sglang.engine import SglangEngine

__all__ = ["SglangEngine"]
