"""SGLang servers as one engine: launched or attached, streamed from over HTTP, updated in flight and verified.

    engine.py     the engine: a thread with a loop, thin hands into it
    fleet.py      all servers of an actor: dispatch, supervision, versions
    server.py     one server in service: gate, streams        partial.py   a continuation across aborts and deaths
    update.py     one weight update, verified                 transports.py, layout.py   how weights travel; what a
                                                              server must then hold
    api.py        HTTP                                        launch.py, process.py, keeper.py   a server's processes
    model.py      facts of the model                      texts.py   one server of texts, for as long as work lasts

No module imports sglang: servers live in an environment of their own (cpu/ has what it needs on a CPU).
"""

from sgpo_async.engines.sglang.engine import SglangEngine

__all__ = ["SglangEngine"]
