"""The complete extraction with a misbehaving endpoint: planted leaks, kill and resume, one-line errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sgpo_async.cli.main import main
from sgpo_async.local.children import ROOT
from sgpo_async.tasks.files import read_problems
from sgpo_async.tasks.sources import open_source

pytestmark = pytest.mark.process

ITEMS = 200
CLEAN = ("Isolate the unknown", "Divide both sides in 2 cases", "Compare with the 12 given", "First do the 2nd part")
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def numbers(item: int) -> tuple[int, int, int]:
    """Answer and intermediate results of an item, unique to it: 31 + 74 = 105, so 105 - 74 = 31, and so on."""
    answer, taken = 31 + item % 9, 74 + 2 * item
    return answer, taken, answer + taken


def leaks(item: int) -> tuple[str, ...]:
    """Leaks of the answer (in digits, by value, in words) and of the intermediate results; the problem contains 12."""
    answer, taken, whole = numbers(item)
    return (
        *(f"The result is {answer}", f"It comes to \\boxed{{{answer}}}", f"So x equals {answer}.0"),
        *(f"Thirty-{WORDS[answer - 31]} remain", f"Note the {whole} there", f"Take {2 * answer}/2 of them"),
        *(f"Subtract to get {whole}", f"The share is {answer}00 %", f"There are \\frac{{{2 * answer}}}{{2}}"),
        f"Divide {taken} by 3",
    )


def leak_in(record: dict, text: str) -> int | None:
    """The kind of leak that is planted in this text, or None."""
    planted = leaks(record["item"])
    return next((kind for kind, leak in enumerate(planted) if leak in text), None)


def write_problems(path: Path) -> tuple[set[str], set[str]]:
    """Write 200 problems; return those with a clean candidate and those without. Every second has a leaking one."""
    rows, clean, hopeless = [], set(), set()
    for i in range(ITEMS):
        texts = [CLEAN[(i + j) % len(CLEAN)] for j in range(5)]
        if i % 2:
            texts[i % 5] = leaks(i)[i // 2 % 10]
        if i % 10 == 0:
            texts = ["nonsense", *[leaks(i)[(i // 10 + j) % 10] for j in range(4)]]
        problem = f"There are 12 apples, case {'abcdefghij'[i % 10] * (1 + i // 10)}. How many are left?"
        (hopeless if i % 10 == 0 else clean).add(problem)
        answer, taken, whole = numbers(i)
        response = f"{whole} - {taken} = {answer}. SAY {json.dumps(texts)} YAS"
        rows.append({"problem": problem, "answer": str(answer), "response": response})
    rows.append({"problem": "without a response", "answer": "1"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return clean, hopeless


class Workspace:
    """A folder with problems, a running endpoint, and the commands that use them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "requests.log"
        self.clean, self.hopeless = write_problems(folder / "problems.jsonl")
        port = folder / "port"
        script = str(Path(__file__).with_name("misbehaving_endpoint.py"))
        self.process = subprocess.Popen([sys.executable, script, str(port), str(self.log)])
        deadline = time.monotonic() + 60
        while not (port.exists() and port.read_text()):
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self.url = f"http://127.0.0.1:{port.read_text()}/v1"

    def requests(self) -> int:
        """The number of requests that the endpoint has answered."""
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def command(self, *arguments: str, model: str = "strong") -> list[str]:
        server = ["--url", self.url, "--model", model, "--key-env", "TEST_KEY"]
        return [sys.executable, "-m", "sgpo_async.cli", "strategies", *arguments, *server]

    def run(self, *arguments: str, key: str = "secret", model: str = "strong") -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"TEST_KEY": key, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            self.command(*arguments, model=model), env=environment, capture_output=True, text=True, timeout=200,
            check=False,
        )  # fmt: skip

    def extract(self, name: str, library: str, **options: str) -> subprocess.CompletedProcess[str]:
        return self.run(*self.extraction(name, library), **options)

    def extraction(self, name: str, library: str, problems: str = "problems.jsonl") -> list[str]:
        files = ["extract", str(self.folder / problems)]
        return [*files, "--work", str(self.folder / name), "--library", str(self.folder / library)]


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def records_of(work: Path) -> list[dict]:
    """The finished items of a work file, without the lines of single replies."""
    lines = [json.loads(line) for line in work.read_bytes().split(b"\n")[:-1]]
    return [line for line in lines if "reply" not in line]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    workspace = Workspace(tmp_path_factory.mktemp("strategies"))
    yield workspace
    workspace.process.kill()
    workspace.process.wait(120)


@pytest.fixture(scope="module")
def extracted(workspace: Workspace) -> str:
    done = workspace.extract("work.jsonl", "library.jsonl")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_planted_leak_is_rejected_and_every_clean_candidate_is_kept(workspace: Workspace, extracted: str) -> None:
    records = records_of(workspace.folder / "work.jsonl")
    assert len(records) == ITEMS
    item_of = {row["problem"]: i for i, row in enumerate(rows_of(workspace.folder / "problems.jsonl"))}
    records = [record | {"item": item_of[record["problem"]]} for record in records]
    assert not [text for record in records for text in record["candidates"] if leak_in(record, text) is not None]
    leak_kinds = [
        leak_in(record, rejected["text"])
        for record in records
        for rejected in record["rejected"]
        if rejected["reason"] == "leak"
    ]
    assert None not in leak_kinds
    assert len(leak_kinds) > ITEMS / 2
    assert set(leak_kinds) == set(range(10))
    library = read_problems(str(workspace.folder / "library.jsonl"))
    assert {problem.problem for problem in library} == workspace.clean
    failed = {record["problem"]: record["failed"] for record in records if record["failed"]}
    assert failed.keys() == workspace.hopeless
    assert {reason.partition(" (")[0] for reason in failed.values()} == {"no candidate is left"}
    assert "180 with a strategy" in extracted
    assert "20 failed: no candidate is left" in extracted


def test_the_endpoint_caused_every_kind_of_fault(workspace: Workspace, extracted: str) -> None:
    """The faults cause no failed item: the failed items of the test above failed only because of their leaks."""
    faults = Path(f"{workspace.log}.faults").read_text().split()
    assert {fault: faults.count(fault) > ITEMS / 10 for fault in faults} == dict.fromkeys(
        ("429", "500", "cut", "nonsense"), True
    )


def test_the_library_can_be_trained_on(workspace: Workspace, extracted: str) -> None:
    path = str(workspace.folder / "library.jsonl")
    source = open_source("file", path=path, held_out=10, seed=0)
    problem = source.training(0)
    assert problem.strategy is not None
    assert problem.strategy.startswith("Problem type: ")
    row = json.loads(Path(path).read_text().splitlines()[0])
    assert (row["model"], row["endpoint"]) == ("strong", workspace.url.removeprefix("http://").removesuffix("/v1"))
    assert row["prompts"]
    assert "secret" not in Path(path).read_text() + (workspace.folder / "work.jsonl").read_text()


def test_a_killed_and_resumed_run_writes_the_same_library_and_pays_for_nothing_twice(
    workspace: Workspace, extracted: str
) -> None:
    work = workspace.folder / "killed.jsonl"
    environment = os.environ | {"TEST_KEY": "secret", "PYTHONPATH": str(ROOT)}
    command = workspace.command(*workspace.extraction("killed.jsonl", "again.parquet"))
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    before = workspace.requests()
    deadline = time.monotonic() + 120
    while not (work.exists() and len(records_of(work)) > 60) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(120)
    with work.open("ab") as file:
        file.write(b'{"key": "half a li')
    hopeless = sum(bool(record["failed"]) for record in records_of(work))
    assert len(records_of(work)) - hopeless > 0

    done = workspace.extract("killed.jsonl", "again.parquet")
    assert done.returncode == 0, done.stderr
    strategy = {problem.problem: problem.strategy for problem in read_problems(str(workspace.folder / "again.parquet"))}
    assert strategy == {p.problem: p.strategy for p in read_problems(str(workspace.folder / "library.jsonl"))}
    # Each problem needs five candidates, a ranking if one is left, and five others if it failed before the kill. Only
    # the requests in flight at the kill, for at most eight problems, may come on top.
    needed = 5 * ITEMS + len(workspace.clean) + 5 * hopeless
    assert needed <= workspace.requests() - before <= needed + 8 * 5


def test_a_second_run_requests_only_failed_items(workspace: Workspace, extracted: str) -> None:
    before = workspace.requests()
    assert workspace.extract("work.jsonl", "library.jsonl").returncode == 0
    assert workspace.requests() - before == 5 * len(workspace.hopeless)


def test_ranking_again_extracts_nothing(workspace: Workspace, extracted: str) -> None:
    rank = ("rank", str(workspace.folder / "work.jsonl"), "--library", str(workspace.folder / "ranked.jsonl"))
    for requests in (len(workspace.clean), 0):  # the second time there is nothing left to do
        before = workspace.requests()
        done = workspace.run(*rank, model="judge")
        assert done.returncode == 0, done.stderr
        assert workspace.requests() - before == requests
    rows = rows_of(workspace.folder / "ranked.jsonl")
    assert {(row["model"], row["judge"]) for row in rows} == {("strong", "judge")}


def test_check_finds_a_leak_that_was_added_later(workspace: Workspace, extracted: str) -> None:
    library = workspace.folder / "library.jsonl"
    assert workspace.run("check", str(library)).returncode == 0
    rows = rows_of(library)
    rows[3]["strategy"] += f"\nIt is {rows[3]['answer']}."
    leaking = workspace.folder / "leaking.jsonl"
    leaking.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = workspace.run("check", str(leaking))
    assert done.returncode == 1
    assert f"{leaking}:4: the answer's number {rows[3]['answer']}" in done.stdout


def test_stats_report_the_tokens_that_the_endpoint_charged(workspace: Workspace) -> None:
    few = (workspace.folder / "problems.jsonl").read_text().splitlines(keepends=True)[:30]
    (workspace.folder / "few.jsonl").write_text("".join(few))
    work, library = str(workspace.folder / "paid.jsonl"), str(workspace.folder / "paid-library.jsonl")
    before = workspace.requests()
    for _ in range(2):  # the second time only for the three hopeless problems
        assert workspace.run(*workspace.extraction("paid.jsonl", "paid-library.jsonl", "few.jsonl")).returncode == 0
    assert workspace.run("rank", work, "--library", library, model="judge").returncode == 0
    charged = [line.split()[1:] for line in workspace.log.read_text().splitlines()[before:]]
    assert len(charged) == 5 * 30 + 27 + 5 * 3 + 27
    sent, received = (sum(int(line[column]) for line in charged) for column in (0, 1))
    done = workspace.run("stats", work, "--prompt-price", "3", "--completion-price", "15")
    assert f"{sent:,} tokens sent, {received:,} received, cost {3e-6 * sent + 15e-6 * received:,.2f}" in done.stdout
    assert "rejected (leak)" in done.stdout
    histogram = done.stdout.partition("mean score of the best candidate (1 to 5):\n")[2]
    assert sum(int(count) for count in re.findall(r"(\d+)$", histogram, re.MULTILINE)) == 27  # a bar for each score


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_writes_the_library_of_finished_items(workspace: Workspace, number: int, code: int) -> None:
    work, library = workspace.folder / f"cut-{code}.jsonl", workspace.folder / f"cut-{code}-library.jsonl"
    environment = os.environ | {"TEST_KEY": "secret", "PYTHONPATH": str(ROOT)}
    # A shell starts background commands with SIGINT ignored, and the tests may run in the background.
    command = ["env", "--default-signal=INT", *workspace.command(*workspace.extraction(work.name, library.name))]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (work.exists() and len(records_of(work)) > 20):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code
    finished = [record["problem"] for record in records_of(work) if not record["failed"]]
    assert 0 < len(finished) < len(workspace.clean)
    assert {problem.problem for problem in read_problems(str(library))} == set(finished)
    assert f"library: {library}, {len(finished)} problems" in output.replace("\n", " ")


def test_a_run_whose_endpoint_fails_writes_the_library_of_finished_items(workspace: Workspace, extracted: str) -> None:
    (workspace.folder / "refused.jsonl").write_bytes((workspace.folder / "work.jsonl").read_bytes())
    done = workspace.extract("refused.jsonl", "refused-library.parquet", key="wrong")
    assert done.returncode == 2
    assert "status 401" in done.stderr
    assert len(read_problems(str(workspace.folder / "refused-library.parquet"))) == len(workspace.clean)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--concurrency", "0"], "--concurrency must be >= 1, got 0"),
        (["--candidates", "0"], "--candidates must be >= 1, got 0"),
        (["--max-tokens", "-1"], "--max-tokens must be >= 1, got -1"),
        (["--timeout", "0"], "--timeout must be > 0, got 0"),
        (["--timeout", "nan"], "--timeout must be a finite number, got nan"),
        (["--prompt-price", "inf"], "--prompt-price must be a finite number, got inf"),
        (["--extra", "{top_p"], "--extra must be JSON"),
        (["--extra", "[1]"], "--extra must be a JSON object such as"),
        (["--extra", '{"model": "other", "stream": true}'], "--extra must not contain model, got 'other'"),
        (["--serve"], "--serve must not be given with --url, got 'http"),
        (["--library", "x.csv"], "--library must be a file name that ends in .jsonl or .parquet, got 'x.csv'"),
        (["--library", "FOLDER/problems.jsonl"], "--library must not be a file that the command reads"),
    ],
)
def test_options_are_validated_before_the_first_request(
    workspace: Workspace, arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = workspace.requests()
    arguments = [argument.replace("FOLDER", str(workspace.folder)) for argument in arguments]
    command = workspace.command(*workspace.extraction("examined.jsonl", "examined-library.jsonl"), *arguments)
    assert main(command[3:]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert error in lines[0]
    assert workspace.requests() == before
    assert not (workspace.folder / "examined.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "--url or --serve must be given"),
        (["--serve", "engine.sglang.servers=2"], "engine.sglang.servers must be 1, got 2; set engine.sglang.tp"),
        (
            ["--serve", "engine.sglang.urls=[http://h:1]"],
            "to ask a running server, use --url http://h:1/v1 instead",
        ),
        (["--serve", "engine.slot=2"], "did you mean engine.slots?"),
        (["--serve", "engine.sglang.python=/nowhere/python"], "'/nowhere/python' does not exist"),
        (["--serve", "--model", "./nowhere"], "--model: ./nowhere: no such folder"),
    ],
)
def test_a_server_that_cannot_be_launched_is_reported_in_one_line(
    workspace: Workspace, arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    extraction = workspace.extraction("own.jsonl", "own-library.jsonl")
    assert main(["strategies", *extraction, "--model", "builtin:cues", *arguments]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and error in line
    assert not (workspace.folder / "own-library.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"key": "wrong"}, "status 401: .*; check the API key"),
        ({"model": "weak"}, "status 404: .*; check --url and --model"),
    ],
)
def test_a_permanent_error_ends_the_run_with_one_line(
    workspace: Workspace, options: dict[str, str], error: str
) -> None:
    done = workspace.extract("wrong.jsonl", "wrong-library.jsonl", **options)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(error, lines[0])
    assert "Traceback" not in done.stderr
    assert not (workspace.folder / "wrong-library.jsonl").exists()


def test_a_run_without_a_server_ends_at_once_and_writes_no_library(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "url", "http://127.0.0.1:9/v1")
    done = workspace.extract("nowhere.jsonl", "nowhere-library.jsonl")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "http://127.0.0.1:9/v1: no server answers (" in line and line.endswith("; check --url")
    assert not (workspace.folder / "nowhere-library.jsonl").exists()
