"""Evaluations on disk, their metrics and comparisons, without a model."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from sgpo_async.cli.evaluate import parse_samples
from sgpo_async.cli.evaluation_tables import comparison, summary
from sgpo_async.config import Run
from sgpo_async.errors import ConfigError, DataError
from sgpo_async.evaluation.compare import compare_folders
from sgpo_async.evaluation.evaluation_plan import EvaluationPlan
from sgpo_async.evaluation.results import Results
from sgpo_async.metrics.problems import ProblemResult, summarise
from sgpo_async.tasks.base import Problem
from sgpo_async.tasks.benchmarks import Benchmark


def result(id: str, correct: Sequence[int], *, tokens: int = 10, finish: str = "stop") -> ProblemResult:
    n = len(correct)
    return ProblemResult(
        id=id,
        digest=f"digest of {id}",
        correct=[bool(c) for c in correct],
        tokens=[tokens] * n,
        finish=[finish] * n,
        timed_out=[False] * n,
    )


def plan(
    samples: int = 4, *, guided: bool = False, temperature: float = 0.6, strategy: str | None = "s"
) -> EvaluationPlan:
    problems = [Problem(id=str(i), problem=f"{i}?", answer=str(i), strategy=strategy) for i in range(3)]
    benchmark = Benchmark(name="sums", problems=problems, samples=samples)
    return EvaluationPlan(run=Run(), benchmarks=[benchmark], temperature=temperature, top_p=0.95, guided=guided)


SETTINGS = plan().settings("d16e57")
RESULTS = [
    result("0", [1, 0, 0, 0]),
    result("1", [1, 1, 0, 0], tokens=30),
    result("2", [0, 0, 0, 0], tokens=64, finish="length"),
]


def complete(folder: Path, results: Sequence[ProblemResult]) -> Path:
    found = Results(folder)
    with found.writing(SETTINGS):
        for problem_result in results:
            found.add("sums", problem_result)
        found.finish({"benchmarks": {"sums": summarise(results)}})
    return folder


def test_the_metrics_equal_values_computed_by_hand() -> None:
    """avg@4: (1/4 + 1/2 + 0) / 3; pass@2: (1/2 + 5/6 + 0) / 3; pass@4: (1 + 1 + 0) / 3."""
    found = summarise(RESULTS)
    assert found["avg"]["mean"] == pytest.approx(0.25)
    assert {k: value["mean"] for k, value in found["pass"].items()} == pytest.approx(
        {"1": 1 / 4, "2": 4 / 9, "4": 2 / 3}
    )
    assert (
        found["avg"]["low"] == 0 and found["avg"]["high"] == 0.5
    )  # the extreme resamples: only problem 2, only problem 1
    assert (found["problems"], found["samples"], found["timed_out"]) == (3, 4, 0)
    assert found["truncated"] == pytest.approx(1 / 3)
    assert found["tokens"] == 4 * (10 + 30 + 64) and found["tokens_mean"] == pytest.approx(104 / 3)
    assert summarise(RESULTS[::-1]) == found, "the order of completion does not matter"


def test_an_evaluation_resumes_after_its_last_complete_line(tmp_path: Path) -> None:
    first = Results(tmp_path)
    with first.writing(SETTINGS):
        first.add("sums", RESULTS[0])
    with (tmp_path / "sums.jsonl").open("a") as file:
        file.write('{"id": "1", "correct": [tr')
    again = Results(tmp_path)
    assert again.problems("sums") == RESULTS[:1]
    with again.writing(SETTINGS):
        again.add("sums", RESULTS[1])
    assert Results(tmp_path).problems("sums") == RESULTS[:2]
    assert Results(tmp_path).settings() == SETTINGS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (plan(temperature=1.0).settings("d16e57"), "temperature: 1.0, 0.6 there"),
        (plan(samples=8).settings("d16e57"), "benchmarks.sums.samples: 8, 4 there"),
        (plan().settings("beef"), "model: beef, d16e57 there"),
        (plan(guided=True).settings("d16e57"), "guided: True, False there"),
    ],
)
def test_an_evaluation_with_different_settings_is_refused(tmp_path: Path, settings: dict, message: str) -> None:
    complete(tmp_path, RESULTS)
    with pytest.raises(ConfigError, match=message), Results(tmp_path).writing(settings):
        pass


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    with (
        Results(tmp_path).writing(SETTINGS),
        pytest.raises(ConfigError, match="another process evaluates here"),
        Results(tmp_path).writing(SETTINGS),
    ):
        pass


def test_a_broken_line_before_the_last_is_named(tmp_path: Path) -> None:
    complete(tmp_path, RESULTS)
    path = tmp_path / "sums.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], '{"id": "1"}', lines[2]]) + "\n")
    with pytest.raises(DataError, match=r"sums\.jsonl:2: is no result of a problem"):
        Results(tmp_path).problems("sums")


def test_two_evaluations_are_compared_problem_by_problem(tmp_path: Path) -> None:
    """a - b: -1/4, 1/2 and 0. Every choice of signs gives a sum of at least 1/4 in absolute value, so p = 1."""
    a = complete(tmp_path / "a", RESULTS)
    others = [result("2", [0, 0]), result("0", [1, 0]), result("1", [0, 0])]  # another order, another k
    found = compare_folders(a, complete(tmp_path / "b", others)).benchmarks["sums"]
    assert (found.avg_a, found.avg_b) == (pytest.approx(0.25), pytest.approx(1 / 6))
    assert found.paired.difference.mean == pytest.approx(1 / 12)
    assert (found.paired.better, found.paired.worse, found.paired.p_value) == (1, 1, 1.0)
    assert (found.k, found.samples_a, found.samples_b) == (2, 4, 2)
    assert (found.pass_a, found.pass_b) == (pytest.approx(4 / 9), pytest.approx(1 / 3))
    assert found.pass_difference.mean == pytest.approx(1 / 9)


def test_problems_of_only_one_evaluation_are_left_out_and_counted(tmp_path: Path) -> None:
    """A problem that could not be served has no line: problem 0 in A, problems 1 and 3 in B."""
    first, second = [RESULTS[1], RESULTS[2], result("3", [1, 1])], [RESULTS[0], RESULTS[2]]
    a, b = complete(tmp_path / "a", first), complete(tmp_path / "b", second)
    found = compare_folders(a, b)
    sums = found.benchmarks["sums"]
    assert (sums.left_out_a, sums.left_out_b, sums.paired.problems) == (2, 1, 1)
    assert (sums.avg_a, sums.avg_b, sums.k) == (0, 0, 4)
    line = "sums: left out: 2 problems of A and 1 of B that the other lacks."
    assert line in printed(comparison(a, b, found)).splitlines()
    whole = compare_folders(a, a)
    assert "left out" not in printed(comparison(a, a, whole))


def test_incomparable_evaluations_are_refused(tmp_path: Path) -> None:
    a = complete(tmp_path / "a", RESULTS)
    with pytest.raises(DataError, match="summary.json: cannot be read"):
        compare_folders(a, tmp_path / "none")
    changed = [replace(RESULTS[0], digest="another"), *RESULTS[1:]]
    for number, (results, which) in enumerate([(changed, "problem 0 is not"), ([result("9", [1])], "no problem is")]):
        with pytest.raises(DataError, match=f"sums: {which} the same in both; evaluate the same file"):
            compare_folders(a, complete(tmp_path / str(number), results))
    other = Results(tmp_path / "other")
    with other.writing(SETTINGS):
        other.finish({"benchmarks": {}})
    with pytest.raises(DataError, match="no benchmark in common"):
        compare_folders(a, tmp_path / "other")


def test_an_invalid_plan_is_refused() -> None:
    with pytest.raises(DataError, match="sums: problem 0 has no strategy; evaluate it without --guided"):
        plan(guided=True, strategy=None)
    with pytest.raises(ConfigError, match="--temperature must be > 0, got"):
        plan(temperature=0.0)
    with pytest.raises(ConfigError, match="--top-p"):
        replace(plan(), top_p=1.5)


def test_samples_are_set_for_all_benchmarks_or_for_one() -> None:
    assert parse_samples([]) == {"": 1}
    assert parse_samples(["4", "aime24=32"]) == {"": 4, "aime24": 32}
    for word in ("0", "four", "aime24=", "-1"):
        with pytest.raises(ConfigError, match="must be K or NAME=K, e.g. 4 or aime24=32, got "):
            parse_samples([word])


def test_both_tables_fit_80_columns(tmp_path: Path) -> None:
    """Even with the widest possible values."""
    name = "olympiadbench"
    perfect = summarise([result(str(i), [1] * 6) for i in range(674)])
    evaluation = {
        "model": {"path": "runs/demo/policy", "digest": "0123456789abcdef"},
        "sampling": {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 16384, "guided": False},
        "benchmarks": {name: perfect | {"truncated": 1.0, "timed_out": 3}},
    }
    a = complete(tmp_path / "a", [result(str(i), [1] * 31 + [0]) for i in range(674)])
    b = complete(tmp_path / "b", [result(str(i), [1] + [0] * 15) for i in range(674)])
    first, second = printed(summary(evaluation)), printed(comparison(Path("a"), Path("b"), compare_folders(a, b)))
    assert "olympiadbench  674 x 6  100 [99.5, 100]  100 [99.5, 100] @4" in first
    assert "3 completions were not judged in time" in first
    assert "avg@32, 16  96.9   6.2  +90.6 [+90.6, +90.6]  < 0.0001" in second
    assert "674 / 0 of 674  pass@16      100   100     +0.0 [+0.0, +0.0]" in second


def printed(lines: Iterable[RenderableType]) -> str:
    console = Console(width=80, file=StringIO())
    for line in lines:
        console.print(line)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()
