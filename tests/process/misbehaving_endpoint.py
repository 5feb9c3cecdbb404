"""An OpenAI-compatible endpoint on loopback whose first answers often fail: misbehaving_endpoint.py PORT_FILE LOG_FILE.

A digest of the request decides its behaviour, so every run behaves the same. When a request arrives for the first time,
the endpoint may answer 429 with Retry-After or 500, cut the connection, or send an invalid body; the second time it
answers correctly. Its candidates contain the texts that the response of the problem lists as `SAY [...] YAS`. It writes
one line to LOG_FILE for each answered request (its digest and token counts), and one to LOG_FILE.faults for each fault.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import sys
from pathlib import Path

from aiohttp import web

SEEN: set[str] = set()
FAILURES = ("429", "500", "cut", "nonsense")
FAULTS = (*FAILURES, "none", "slow", "none", "none")
APPROACHES = ("Isolate the unknown quantity", "Draw a picture of all relations", "Work backwards from the goal")


def candidate(prompt: str, seed: int) -> str:
    texts = json.loads(re.search(r"SAY (\[.*?\]) YAS", prompt)[1])
    text = texts[seed % len(texts)]
    if text == "nonsense":
        return "I cannot do that, but here is a poem."
    steps = ["Name what is asked for.", f"{text}."]
    kind = f"Type {seed % 1000} of {APPROACHES[seed % 3]}"
    kind = re.sub(r"\d+", lambda m: "".join(chr(97 + int(c)) for c in m[0]), kind)
    return json.dumps({"type": kind, "strategy": f"{APPROACHES[seed % 3]}, {kind} {kind[::-1]}.", "steps": steps})


def scores(prompt: str) -> str:
    count = int(re.search(r"solution, and (\d+) candidate", prompt)[1])
    return json.dumps(
        {"scores": [dict.fromkeys(("type", "approach", "abstraction", "clean"), 1 + i % 5) for i in range(count)]}
    )


async def chat(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    if request.headers.get("Authorization") != "Bearer secret":
        return web.json_response({"error": "no such key"}, status=401)
    if body["model"] not in ("strong", "judge"):
        return web.json_response({"error": "no such model"}, status=404)
    prompt, seed = body["messages"][0]["content"], body["seed"]
    digest = hashlib.blake2b(f"{seed} {prompt}".encode(), digest_size=8).hexdigest()
    first, fault = digest not in SEEN, FAULTS[int(digest, 16) % len(FAULTS)]
    SEEN.add(digest)
    if first and fault in FAILURES:
        with Path(f"{sys.argv[2]}.faults").open("a") as log:
            log.write(f"{fault}\n")
    if first and fault == "429":
        return web.Response(status=429, headers={"Retry-After": "0.05"})
    if first and fault == "500":
        return web.Response(status=500, text="overloaded\nsorry")
    if first and fault == "nonsense":
        return web.Response(text='{"choices": []}')
    if first and fault == "cut":
        answer = web.StreamResponse(headers={"Content-Length": "1000"})
        await answer.prepare(request)
        await answer.write(b'{"choices": [{"mess')
        request.transport.close()
        return answer
    await asyncio.sleep(0.2 if fault == "slow" else 0.005)
    text = scores(prompt) if "candidate strategies" in prompt else candidate(prompt, seed)
    usage = {"prompt_tokens": len(prompt) // 4, "completion_tokens": len(text) // 4}
    with Path(sys.argv[2]).open("a") as log:
        log.write(f"{digest} {usage['prompt_tokens']} {usage['completion_tokens']}\n")
    return web.json_response({"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage})


async def main() -> None:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    Path(sys.argv[1]).write_text(str(site._server.sockets[0].getsockname()[1]))
    await asyncio.sleep(3600)


if __name__ == "__main__":
    asyncio.run(main())
