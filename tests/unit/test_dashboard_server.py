"""The dashboard over HTTP: who may read it, what it answers, and that nothing from outside becomes markup."""

import json
import logging
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from dashboard_support import HOSTILE, TOKEN, ask, get, get_json, observer_of, trained_status
from synthetic_metrics import synthetic_lines, write_lines

from sgpo_async.dashboard.access import Access, token_from
from sgpo_async.errors import SgpoError

PATHS = ("/", "/page.css", "/page.js", "/api/status", "/api/curves", "/api/samples", "/metrics")


def rollout(slot: int, *, guided: bool = False, correct: bool = True, text: str = "a b") -> dict[str, Any]:
    own = {"slot": slot, "guided": guided, "reward": float(correct), "correct": correct, "finish": "stop", "tokens": 2}
    return own | {"text": text, "versions": [3], "ends": [2]}


def sample(step: int, *, correct: bool = True, text: str = "a b", problem: str = "a problem") -> dict[str, Any]:
    distilled = rollout(1, guided=True, text=text) | {"kl": [0.01, 2.5], "pieces": [text, text]}
    own = {
        "step": step,
        "task": step,
        "version": step,
        "problem": problem,
        "strategy": text,
        "answer": text,
        "alpha": 1.0,
    }
    return own | {"rollouts": [rollout(0, correct=correct, text=text), distilled]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    write_lines(run, synthetic_lines(40))
    samples = [sample(step, correct=step % 2 == 0, problem=f"problem {step}") for step in range(1, 21)]
    (run / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
    return run


# ---- who may read it


def test_without_a_token_only_names_of_loopback_are_answered(folder: Path) -> None:
    """A web site whose DNS name points at 127.0.0.1 sends its own name in the Host header."""
    names = ["127.0.0.1", "127.0.0.1:8265", "localhost:1", "[::1]", "[::1]:9", "LOCALHOST"]
    others = [
        "evil.example",
        "evil.example:8265",
        "127.0.0.1.evil.example",
        "10.0.0.1",
        "localhost.evil.example:80",
        "",
    ]
    observer = observer_of(folder)
    found = ask(observer, *(get(path, Host=host) for host in names[:5] for path in PATHS))
    assert {status for status, *_ in found} == {200}
    found = ask(observer, *(get(path, Host=host) for host in others for path in (*PATHS, "/healthz", "/x")))
    assert {(status, text) for status, text, _ in found} == {
        (403, "the Host header must be 127.0.0.1, localhost or [::1]; or set a token\n")
    }


def test_with_a_token_every_path_but_healthz_needs_it(folder: Path) -> None:
    wrong = [{}, {"Authorization": f"Bearer {TOKEN[:-1]}"}, {"Authorization": f"Basic {TOKEN}"}]
    wrong += [
        {"Authorization": "Bearer "},
        {"Cookie": f"sgpo_async_8265={TOKEN}x"},
        {"Cookie": f"sgpo_async_1={TOKEN}"},
    ]
    wrong += [{"Authorization": "Bearer \u00e9"}]
    observer = observer_of(folder)
    found = ask(observer, *(get(path, **headers) for headers in wrong for path in (*PATHS, "/x")), token=TOKEN)
    assert {status for status, *_ in found} == {401}
    assert all(headers["WWW-Authenticate"] == "Bearer" for *_, headers in found)
    right = [{"Authorization": f"Bearer {TOKEN}"}, {"Authorization": f"bearer {TOKEN}", "Host": "any.example"}]
    right += [{"Cookie": f"sgpo_async_8265={TOKEN}"}]
    found = ask(observer, *(get(path, **headers) for headers in right for path in PATHS), token=TOKEN)
    assert {status for status, *_ in found} == {200}
    ((status, text, _),) = ask(observer, get("/healthz", Host="any.example"), token=TOKEN)
    assert status == 503 and TOKEN not in text


def test_a_token_in_the_address_becomes_a_cookie_and_leaves_the_address(folder: Path) -> None:
    observer = observer_of(folder)
    right, wrong, head = ask(
        observer, get(f"/?token={TOKEN}"), get("/?token=x"), get(f"/?token={TOKEN}", method="HEAD"), token=TOKEN
    )
    assert right[0] == 303 and right[2]["Location"] == "./"
    cookie = right[2]["Set-Cookie"]
    assert cookie.startswith(f"sgpo_async_8265={TOKEN};") and "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert wrong[0] == head[0] == 401 and "Set-Cookie" not in wrong[2]
    (ignored,) = ask(observer, get("/?token=x"))
    assert ignored[0] == 200 and "Set-Cookie" not in ignored[2], "without a token there is nothing to know"


def test_the_token_is_never_logged(folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    """Not even with an internal error, or in a repr."""
    observer = observer_of(folder)
    monkeypatch.setattr(observer, "view", lambda: 1 / 0)
    paths = [f"/?token={TOKEN}", f"/api/status?token={TOKEN}", f"/healthz?tok={TOKEN}", "/?token=wrong-one"]
    with caplog.at_level(logging.DEBUG):
        found = ask(observer, *(get(path, Authorization=f"Bearer {TOKEN}") for path in paths), token=TOKEN)
    assert [status for status, *_ in found] == [303, 303, 500, 200]
    assert "internal error at /healthz" in caplog.text
    # The access log of aiohttp is off in `serve`; process/test_dashboard looks at what that writes.
    texts = [record.getMessage() + str(record.exc_text) for record in caplog.records if record.name != "aiohttp.access"]
    assert texts and not any(TOKEN in text or "wrong-one" in text for text in texts)
    assert TOKEN not in repr(Access(TOKEN, 1))


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_nothing_but_get_and_head_is_answered(folder: Path, method: str) -> None:
    for token in ("", TOKEN):
        headers = {"Authorization": f"Bearer {TOKEN}"} if token else {}
        found = ask(observer_of(folder), *(get(path, method=method, **headers) for path in PATHS), token=token)
        assert {status for status, *_ in found} == {405}


def test_head_answers_as_get_without_a_body(folder: Path) -> None:
    found = ask(observer_of(folder), *(get(path, method="HEAD") for path in PATHS))
    assert {(status, text) for status, text, _ in found} == {(200, "")}


def test_files_of_the_run_and_of_the_machine_cannot_be_asked_for(folder: Path) -> None:
    (folder / "hub.token").write_text("secret")
    tails = [
        "/../run/hub.token",
        "/..%2f..%2fetc/passwd",
        "/%2e%2e/hub.token",
        "/hub.token",
        "/page.css/../../hub.token",
    ]
    tails += ["/.//etc/passwd", "/page.py", "/api/samples/../../hub.token", "/page.html"]
    found = ask(observer_of(folder), *(get(path) for path in tails))
    assert {status for status, *_ in found} <= {404}
    assert not any("secret" in text or "root:" in text for _, text, _ in found)


def test_every_answer_has_the_headers_that_forbid_everything_else(folder: Path) -> None:
    found = ask(observer_of(folder), *(get(path) for path in (*PATHS, "/x")), get("/", Host="evil.example"))
    for *_, headers in found:
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
        assert "unsafe" not in policy and "http" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"


def test_a_token_file_is_made_private_and_must_stay_so(tmp_path: Path) -> None:
    path = tmp_path / "token"
    token = token_from(path)
    assert re.fullmatch(r"[0-9a-f]{64}", token) and token_from(path) == token
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    with pytest.raises(SgpoError, match=rf"--token-file: {path} must not be readable by others; run: chmod 600"):
        token_from(path)
    path.chmod(0o600)
    for bad in ("", "short", "two words that are long enough", "\u00e9" * 20):
        path.write_text(bad)
        with pytest.raises(SgpoError, match="one word of at least 16 ASCII characters"):
            token_from(path)
    with pytest.raises(SgpoError, match="cannot be written"):
        token_from(tmp_path / "no" / "token")


# ---- what it answers


def test_the_page_loads_nothing_from_elsewhere(folder: Path) -> None:
    (_, page, _), (_, css, _), (_, script, _) = ask(observer_of(folder), *(get(path) for path in PATHS[:3]))
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["data:,", "page.css", "page.js"]
    assert "style=" not in page and "onclick" not in page, "the policy forbids both"
    assert "url(" not in css and "@import" not in css and "http" not in css + script
    ids = set(re.findall(r'id="(\w+)"', page))
    status = ask(observer_of(folder, trained_status()), get_json("/api/status"))[0]
    assert set(status["html"]) | {"curves", "samples"} <= ids
    assert set(re.findall(r'place\("(\w+)"\)', script)) <= ids


def test_the_sections_of_a_run_with_a_hub(folder: Path) -> None:
    status = trained_status() | {"hub_restarts": 1, "engine_waits": {"weights": 0.1, "leases": 0.2}}
    found = ask(observer_of(folder, status), get_json("/api/status"))[0]
    assert (found["state"], found["step"], found["live"]) == ("training", 40, True)
    html = found["html"]
    assert "step 40 of 5" in html["headline"] and "<progress" in html["headline"]
    assert ">a</td>" in html["fleet"] and "serving" in html["fleet"]
    assert "wait for weights 10.0 %" in html["idle"] and "waits for publication 1.0 %" in html["idle"]
    assert "The hub was restarted" in html["advice"]
    assert [one["what"] for one in found["advice"]] == ["The hub was restarted"]
    assert "ranks" in html["details"]


def test_the_ledger_adds_up_or_says_so(folder: Path) -> None:
    account = {"dispatched": 10, "trained": 4, "dropped": {"stale": 1, "lease_lost": 2}, "in_flight": 2, "buffered": 1}
    status = trained_status() | {"ledger": account | {"rollouts": account}}
    right = ask(observer_of(folder, status), get_json("/api/status"))[0]["html"]["ledger"]
    for words in ("trained 4", "buffered 1", "in flight 2", "dropped 3", "dropped: stale 1, lease_lost 2"):
        assert words in right
    assert "do not add up" not in right
    widths = [float(width) for width in re.findall(r'width="([\d.]+)" height="18"', right)]
    assert widths == [400, 100, 200, 300]
    status["ledger"]["rollouts"] = account | {"trained": 5}
    assert "do not add up" in ask(observer_of(folder, status), get_json("/api/status"))[0]["html"]["ledger"]


def test_curves_are_sent_only_when_there_is_a_new_step(folder: Path) -> None:
    observer = observer_of(folder)
    first, again, earlier, whole = ask(
        observer,
        *(get_json(f"/api/curves?{query}") for query in ("since=-2", "since=40", "since=39", "since=-2&all=1")),
    )
    assert first["step"] == 40 and first["html"].count("<svg") >= 10
    assert again == {"step": 40, "html": None}
    assert earlier["html"] == first["html"]
    assert "<h2>lr</h2>" in whole["html"] and whole["html"].startswith("<h2>Evaluation</h2>")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "loss": 0.5}\n')
    observer.poll()
    assert ask(observer, get_json("/api/curves?since=40"))[0]["step"] == 41


def test_completions_can_be_chosen(folder: Path) -> None:
    def steps(query: str) -> list[int]:
        html = ask(observer_of(folder), get_json(f"/api/samples{query}"))[0]["html"]
        return [int(step) for step in re.findall(r"<b>step (\d+)</b>", html)]

    assert steps("") == [20, 19, 18, 17, 16, 15, 14, 13]
    assert steps("?outcome=solved") == [20, 18, 16, 14, 12, 10, 8, 6]
    assert steps("?outcome=unsolved&problem=PROBLEM%201") == [19, 17, 15, 13, 11, 1]
    assert steps("?problem=none") == []


class Markup(HTMLParser):
    """Collects the tags and attributes of HTML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


TAGS = {"h1", "h2", "h3", "p", "b", "i", "q", "ul", "li", "code", "mark", "span", "div", "progress"}
TAGS |= {"table", "tr", "th", "td", "details", "summary", "figure", "figcaption"}
TAGS |= {"svg", "rect", "line", "path", "circle", "text", "title"}


def test_nothing_from_outside_becomes_markup(folder: Path) -> None:
    """Names, reasons, completions, problems, metrics: none brings a tag, a handler or a control character."""
    line = synthetic_lines(41)[-1] | {HOSTILE: 1.0, "eval_benchmarks": {HOSTILE: score()}}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    (folder / "samples.jsonl").write_text(
        json.dumps(sample(1, text=HOSTILE, problem=HOSTILE) | {"task": HOSTILE}) + "\n"
    )
    config = {"name": HOSTILE, "hub": {"canary_tolerance": HOSTILE}}
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    status = trained_status()
    server = {"url": HOSTILE, "version": 1, "digest": HOSTILE, "canary": 0.1}
    status["actors"][0] |= {
        "name": HOSTILE,
        "state": HOSTILE,
        "source": HOSTILE,
        "servers": [server],
        "digest": HOSTILE,
    }
    status |= {"quarantined": {HOSTILE: HOSTILE}, "rejected_reasons": {HOSTILE: 2}, "last_rejection": HOSTILE}
    status |= {"rejected": 2, "stalled": HOSTILE, "canary_alarms": {HOSTILE: 1}, "engine_waits": {HOSTILE: 0.5}}
    status["ledger"] |= {"dropped": {HOSTILE: 1}}
    observer = observer_of(folder, status)
    observer._error = HOSTILE
    found = ask(observer, *map(get_json, ("/api/status", "/api/curves?all=1", "/api/samples")))
    assert Markup(found[1]["html"]).tags <= TAGS, "names of metrics are the learner's own, but are escaped, too"
    for html in (*found[0]["html"].values(), found[2]["html"]):
        markup = Markup(html)
        assert markup.tags <= TAGS, markup.tags - TAGS
        assert not any(name.startswith("on") or name in ("style", "src", "href") for name in markup.attributes)
        assert "\x1b" not in html and "\u202e" not in html
    assert "&lt;script&gt;" in found[0]["html"]["fleet"] and "&lt;script&gt;" in found[2]["html"]
    observer._watch.status["closing"] = HOSTILE
    closing, (_, text, _) = ask(observer, get_json("/api/status"), get("/healthz"))
    assert Markup(closing["html"]["headline"]).tags <= TAGS
    assert "script" not in text, "healthz shows nothing from outside"


def score() -> dict[str, Any]:
    return {"name": HOSTILE, "avg": 0.5, "low": 0.4, "high": 0.6, "samples": 4, "problems": 30}


def test_a_line_that_cannot_be_read_is_named_until_the_end(folder: Path) -> None:
    observer = observer_of(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('nonsense\n{"step": 41}\n')
    observer.poll()
    observer.poll()
    advice = ask(observer, get_json("/api/status"))[0]["html"]["advice"]
    assert "cannot read the run" in advice and "metrics.jsonl:41: is not JSON" in advice


# ---- health


def test_health(folder: Path) -> None:
    def health(observer: Any) -> tuple[int, str]:
        ((status, text, _),) = ask(observer, get("/healthz"))
        return status, json.loads(text)["state"]

    status = trained_status()
    (folder / "metrics.jsonl").unlink()
    assert health(observer_of(None, status)) == (200, "training")
    assert health(observer_of(None, status | {"actors": []})) == (200, "waiting")
    assert health(observer_of(None, status, age_s=60)) == (503, "silent")
    assert health(observer_of(None)) == (503, "silent")
    assert health(observer_of(None, status | {"stalled": "x"})) == (503, "stalled")
    assert health(observer_of(None, status | {"closing": "finished"})) == (200, "closing")
    assert health(observer_of(None, status | {"closing": "finished"}, age_s=60)) == (200, "ended")
    assert health(observer_of(folder)) == (503, "interrupted")
    (folder / "summary.json").write_text('{"interrupted": true}')
    assert health(observer_of(folder)) == (503, "interrupted")
    (folder / "summary.json").write_text('{"steps": 40}')
    assert health(observer_of(folder)) == (200, "ended")
    assert health(observer_of(folder, status)) == (200, "training"), "the summary is that of an earlier attempt"
