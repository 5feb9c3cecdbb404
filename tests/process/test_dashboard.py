"""The dashboard beside a real run: over HTTP and in headless Chromium, through deaths of it and of the hub."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from run_support import PATIENCE_S, RealRun, free_port, real_run, until

pytestmark = pytest.mark.process

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt install chromium")


def get(url: str, **headers: str) -> tuple[int, str]:
    """Status and text; (0, "") if nothing listens there."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=PATIENCE_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def get_json(url: str) -> Any:
    return json.loads(get(url)[1])


def dashboard_of(run: RealRun) -> dict[str, Any]:
    """URL and process id of the hub's dashboard, once it runs."""

    def found() -> dict[str, Any]:
        try:
            return json.loads((run.folder / "dashboard.json").read_text())
        except FileNotFoundError:
            return {}

    return until(found, "dashboard.json")


def in_browser(url: str, profile: Path) -> tuple[str, str]:
    """The page's DOM after its script has run, and what the browser has logged on the console."""
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--virtual-time-budget=8000", "--enable-logging=stderr", "--dump-dom", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.slow
def test_a_run_is_watched_through_the_death_of_its_dashboard_and_after_its_end(tmp_path: Path) -> None:
    """The hub starts the dashboard again when it was killed; nothing of it is left after the run."""
    with real_run(tmp_path, "steps=12", "hub.dashboard=127.0.0.1:0") as run:
        local = run.local("learner.checkpoint_every=5")
        first = dashboard_of(run)
        until(lambda: f"dashboard: {first['url']}" in local.output, "the address in the display")
        until(lambda: get_json(f"{first['url']}healthz")["step"] >= 1, "a step")
        assert get(f"{first['url']}healthz")[0] == 200
        status = get_json(f"{first['url']}api/status")
        assert (status["name"], status["steps"], status["live"]) == ("run", 12, True)
        assert "actor-0" in status["html"]["fleet"] and "do not add up" not in status["html"]["ledger"]
        os.kill(first["pid"], signal.SIGKILL)
        second = until(lambda: (now := dashboard_of(run))["pid"] != first["pid"] and now, "another dashboard")
        families = list(text_string_to_metric_families(get(f"{second['url']}metrics")[1]))
        assert any(family.name == "sgpo_async_step" for family in families)
        assert local.wait() == 0, local.output
        run.assert_cleaned_up()
        assert not (run.folder / "dashboard.json").exists()
        assert "the dashboard ended with code -9" in (run.folder / "logs" / "hub.log").read_text()
        _look_at_ended(run)


def _look_at_ended(run: RealRun) -> None:
    """The folder alone shows what has been."""
    port = free_port()
    later = run.start("later", "-m", "sgpo_async.cli", "dashboard", str(run.folder), "--listen", f"127.0.0.1:{port}")
    url = f"http://127.0.0.1:{port}/"
    until(lambda: get(url)[0] == 200, "the dashboard of the ended run")
    health = until(lambda: (now := get_json(f"{url}healthz"))["step"] and now, "the run's files")
    assert (health["state"], health["step"], health["steps"]) == ("ended", 12, 12)
    lines = run.metrics()
    for line in lines:
        waits = line["learner_waits"]
        assert waits["batch"] == line["learner_idle"] and 0 <= sum(waits.values()) <= 1.001
        assert waits["publication"] > 0
        assert (waits["checkpoint"] > 0) == (line["step"] in (6, 11)), "it is a part of the next step"
        assert 0 <= line["uniform"] <= 1 and 0 <= line["cut"] <= 1
    engines = lines[-1]["engine_waits"]
    assert sum(engines.values()) == pytest.approx(lines[-1]["engine_idle"]) and engines["weights"] > 0
    assert get_json(f"{url}api/curves")["html"].count("<svg") >= 10
    assert "<details" in get_json(f"{url}api/samples")["html"]
    later.process.send_signal(signal.SIGINT)
    assert later.wait() == 130
    assert "Traceback" not in later.output


def test_the_dashboard_ends_with_a_hub_that_is_killed_and_follows_the_next_one(tmp_path: Path) -> None:
    """The one beside the hub ends; one that was started by hand says that the hub is silent, and goes on."""
    with real_run(tmp_path, "steps=100", f"hub.address=tcp://127.0.0.1:{free_port()}", "local.actors=1") as run:
        hub = run.hub("hub.dashboard=127.0.0.1:0")
        own, port = dashboard_of(run), free_port()
        run.start("other", "-m", "sgpo_async.cli", "dashboard", "--hub", run.address(), "--listen", f"127.0.0.1:{port}")
        url = f"http://127.0.0.1:{port}/healthz"
        until(lambda: get(url)[0] == 200, "the hub's first answer")
        assert get_json(url)["reason"] == "waiting for the learner"
        child = psutil.Process(own["pid"])
        hub.process.kill()
        child.wait(PATIENCE_S)
        until(lambda: get(url)[0] == 503, "the silence of the hub")
        assert re.fullmatch(r"the hub has not answered for \d+ s", get_json(url)["reason"])
        hub = run.hub()
        until(lambda: get(url)[0] == 200, "the next hub")
        hub.process.terminate()
        assert hub.wait() == 128 + signal.SIGTERM
        assert until(lambda: (now := get_json(url))["state"] == "ended" and now, "the end of the run")["age_s"]


@pytest.mark.slow
def test_an_address_in_use_costs_the_run_nothing(tmp_path: Path) -> None:
    with (
        real_run(tmp_path, "steps=2", "local.actors=1", "local.ranks=1") as run,
        socket.create_server(("127.0.0.1", 0)) as taken,
    ):
        local = run.local(f"hub.dashboard=127.0.0.1:{taken.getsockname()[1]}")
        assert local.wait() == 0, local.output
        log = (run.folder / "logs" / "hub.log").read_text()
        assert log.count("the dashboard ended with code 2, see ") == 1
        said = (run.folder / "logs" / "dashboard.log").read_text()
        assert re.search(
            r"^error: --listen: 127.0.0.1:\d+ cannot be used \(Address already in use\); choose", said, re.M
        )


def test_beyond_loopback_a_token_is_needed_and_never_logged(tmp_path: Path) -> None:
    run = RealRun(tmp_path)
    run.folder.mkdir()
    port = free_port()
    where = ("--listen", f"0.0.0.0:{port}")
    refused = run.start("refused", "-m", "sgpo_async.cli", "dashboard", "--hub", "tcp://127.0.0.1:1", *where)
    assert refused.wait() == 2
    assert refused.output.splitlines()[-1].startswith("error: --token-file must name a file when --listen is beyond")
    served = run.start("served", "-m", "sgpo_async.cli", "dashboard", str(run.folder), *where, "--log-level", "debug")
    try:
        url = f"http://127.0.0.1:{port}/"
        until(lambda: get(url)[0], "an answer")
        path = run.folder / "dashboard.token"
        token = path.read_text().strip()
        assert path.stat().st_mode & 0o777 == 0o600
        assert get(url)[0] == get(f"{url}metrics")[0] == get(f"{url}?token=wrong")[0] == 401
        assert get(f"{url}metrics", Authorization=f"Bearer {token}")[0] == 200
        with socket.create_connection(("127.0.0.1", port)) as raw:  # not HTTP
            raw.sendall(f"GET /?token={token} nonsense\r\n\r\n".encode())
            assert raw.recv(99).startswith(b"HTTP/1.0 400")
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with opener.open(f"{url}?token={token}") as page:  # the cookie, then the page
            assert page.url == url and "<title>sgpo_async</title>" in page.read().decode()
        with opener.open(f"{url}api/status") as answer:
            assert json.load(answer)["state"] == "interrupted"
        assert token not in served.output, served.output
    finally:
        run.close()


@needs_chromium
def test_the_page_works_in_a_browser(tmp_path: Path) -> None:
    """It renders fleet, curves and completions of a real run without an error on the console."""
    with real_run(tmp_path, "steps=4", "hub.dashboard=127.0.0.1:0") as run:
        learner_less = run.local("steps=400")
        url = dashboard_of(run)["url"]
        until(lambda: get_json(f"{url}healthz")["step"] >= 3, "some steps")
        dom, console = in_browser(url, tmp_path / "profile")
        assert console == ""
        assert re.search(r'<td class="name">actor-0</td><td class="good">serving</td>', dom)
        assert dom.count("<svg") >= 10 and "<summary><b>step " in dom and "trained" in dom
        assert re.search(r"<title>\d+/400 training - run</title>", dom)
        assert re.search(r'<p id="age" role="status" class="">The hub answered \d s ago\.</p>', dom)
        learner_less.process.send_signal(signal.SIGINT)
        assert learner_less.wait() == 130
