"""Benchmark files in the layouts of public datasets, with invented problems."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from sgpo_async.config import Run
from sgpo_async.errors import DataError
from sgpo_async.tasks.benchmarks import open_benchmark, separated
from sgpo_async.tasks.cues import CuesSource
from sgpo_async.tasks.task_sampler import TaskSampler
from sgpo_async.tasks.tolerance import Tolerant
from sgpo_async.tasks.verify import VERIFIERS, is_math_correct

MATH500 = {
    "problem": "What is $1 + 1$?",
    "solution": "It is $\\boxed{2}$.",
    "answer": "2",
    "subject": "Algebra",
    "level": 1,
    "unique_id": "test/algebra/1.json",
}
AIME_HF = {
    "id": 60,
    "problem": "Find $2^3$.",
    "solution": "...",
    "answer": "008",
    "url": "https://example.org",
    "year": "2024",
}
AIME_CAPITALS = {"ID": "2024-I-1", "Problem": "Find $2^3$.", "Solution": "...", "Answer": 8}
AIME_BOXED = {"id": "60", "problem": "Find $2^3$.", "solution": "\\boxed{8}", "url": "https://example.org"}
AMC23 = {"id": 0, "question": "What is $3^3$?", "answer": 27.0, "url": "https://example.org"}
OLYMPIAD = {
    "id": 1606,
    "question": "Solve $x^2 - 8x + 15 = 0$.",
    "solution": ["..."],
    "final_answer": ["$3$", "$5$"],
    "context": None,
    "modality": "Text-only",
    "is_multiple_answer": True,
    "unit": None,
    "answer_type": "Numerical",
    "error": None,
}
OWN = {"problem": "What is $4 / 8$?", "answer": "\\frac{1}{2}", "strategy": "Reduce the fraction."}


def write(path: Path, records: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("record", "id", "problem", "verdicts"),
    [
        (MATH500, "test/algebra/1.json", "What is $1 + 1$?", ("$2$", "$3$")),
        (AIME_HF, "60", "Find $2^3$.", ("\\boxed{8}", "\\boxed{80}")),
        (AIME_CAPITALS, "2024-I-1", "Find $2^3$.", ("\\boxed{008}", "\\boxed{9}")),
        (AIME_BOXED, "60", "Find $2^3$.", ("\\boxed{8}", "\\boxed{9}")),
        (AMC23, "0", "What is $3^3$?", ("\\boxed{27}", "\\boxed{26}")),
        (OLYMPIAD, "1606", "Solve $x^2 - 8x + 15 = 0$.", ("\\boxed{5, 3}", "\\boxed{3}")),
        (OWN, "1", "What is $4 / 8$?", ("\\boxed{0.5}", "\\boxed{2}")),
    ],
)
def test_a_record_of_every_layout_is_read(
    tmp_path: Path, suffix: str, record: dict[str, Any], id: str, problem: str, verdicts: tuple[str, str]
) -> None:
    found = open_benchmark("any", write(tmp_path / f"a.{suffix}", [record]), samples=4)
    (read,) = found.problems
    assert (found.name, found.samples, found.verifier) == ("any", 4, "math")
    assert (read.id, read.problem, read.strategy) == (id, problem, record.get("strategy"))
    right, wrong = verdicts
    assert is_math_correct(read.answer, right) and not is_math_correct(read.answer, wrong)


def test_answers_are_normalised_for_the_verifier(tmp_path: Path) -> None:
    records = [AMC23, AMC23 | {"id": 1, "answer": "27"}, AMC23 | {"id": 2, "answer": 0.5}]
    problems = open_benchmark("amc23", write(tmp_path / "a.jsonl", records), samples=1).problems
    assert [problem.answer for problem in problems] == ["27", "27", "0.5"]
    nested = AIME_BOXED | {"solution": "First \\boxed{1}, then \\boxed{\\frac{1}{2}} at last."}
    (problem,) = open_benchmark("aime", write(tmp_path / "b.jsonl", [nested]), samples=1).problems
    assert problem.answer == "\\frac{1}{2}"
    single = OLYMPIAD | {"final_answer": ["$(1,2),(2,1)$"]}
    (problem,) = open_benchmark("olympiad", write(tmp_path / "c.jsonl", [single]), samples=1).problems
    assert is_math_correct(problem.answer, "\\boxed{(2,1),(1,2)}")


def test_a_context_is_put_before_its_problem(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [OLYMPIAD | {"context": "Let $x$ be real."}])
    (problem,) = open_benchmark("olympiadbench", path, samples=1).problems
    assert problem.problem == "Let $x$ be real.\n\nSolve $x^2 - 8x + 15 = 0$."


@pytest.mark.parametrize(
    ("error", "answers", "parts"),
    [
        ("1e-1", ["$3.5$"], (("3.5", 0.1),)),
        ("0.5", ["$3$", "$5$"], (("3", 0.5), ("5", 0.5))),  # one tolerance for all answers
        ("1e-1,1e-2", ["$3.5$", "$5$"], (("3.5", 0.1), ("5", 0.01))),
        ("1e-1,", ["$3.5, 5$"], (("3.5", 0.1), ("5", None))),  # answers in one text; the second is exact
        ("1e-1, 2", ["$(1, 2.5)$, $7$"], (("(1, 2.5)", 0.1), ("7", 2.0))),
        (0.25, ["3"], (("3", 0.25),)),
    ],
)
def test_the_answer_text_contains_the_tolerances(tmp_path: Path, error: Any, answers: list[str], parts: Any) -> None:
    records = [OLYMPIAD | {"error": error, "final_answer": answers}, OLYMPIAD | {"id": 2}]
    tolerant, exact = open_benchmark("olympiad", write(tmp_path / "a.jsonl", records), samples=1).problems
    assert tolerant.verifier == "math-tolerance" and Tolerant.from_text(tolerant.answer).parts == parts
    assert VERIFIERS["math-tolerance"](tolerant.answer, f"\\boxed{{{', '.join(answers).replace('$', '')}}}")
    assert exact.verifier is None and exact.answer == "3, 5"


def test_a_lease_uses_the_tolerant_verifier_only_for_a_problem_with_a_tolerance(tmp_path: Path) -> None:
    records = [OLYMPIAD | {"error": "1e-1", "final_answer": ["3.5"]}, OLYMPIAD | {"id": 2}]
    benchmark = open_benchmark("olympiad", write(tmp_path / "a.jsonl", records), samples=1)
    task_sampler = TaskSampler(Run(), CuesSource(seed=0, held_out=0), [benchmark])
    leases = [task_sampler.task(number).lease(attempt=0, min_version=0) for number in (-1, -2)]
    assert [lease.verifier for lease in leases] == ["math-tolerance", "math"]
    assert [VERIFIERS[lease.verifier](lease.answer, "\\boxed{3.45}") for lease in leases] == [True, False]


def test_an_answer_text_is_split_at_commas_that_separate_answers() -> None:
    assert separated("$3$, $5$") == ["3", "5"]
    assert separated("1,234,567") == ["1,234,567"]
    assert separated("(1,2), [3,4), \\frac{1}{2}") == ["(1,2)", "[3,4)", "\\frac{1}{2}"]
    assert separated("1,2345") == ["1", "2345"]
    assert separated("0.5,100") == ["0.5", "100"]
    assert separated("1234,567") == ["1234", "567"]
    assert separated("-12,345, 1,000.5") == ["-12,345", "1,000.5"]


@pytest.mark.parametrize(
    ("records", "line", "reason"),
    [
        ([], "", "the file contains no problems"),
        (
            [{"question": "?"}],
            ":1",
            "the columns match no known layout, got question; known layouts: problem, answer, unique_id",
        ),
        ([["?"]], ":1", "the columns match no known layout, got list; known layouts: "),
        ([AMC23, {"id": 1, "question": "?"}], ":2", "no column 'answer', which the first record has"),
        ([AMC23, AMC23], ":2", "the id '0' occurs twice"),
        ([MATH500 | {"problem": " "}], ":1", "'problem' must be a text that is not empty"),
        ([MATH500 | {"answer": True}], ":1", "the answer must be a text"),
        (
            [AIME_BOXED | {"solution": "8"}],
            ":1",
            "the record has no answer column, and its solution has no \\boxed{...}",
        ),
        (
            [OLYMPIAD | {"final_answer": None}],
            ":1",
            "'final_answer' must be a list of answers, got None; proofs cannot be verified",
        ),
        (
            [OLYMPIAD | {"modality": "Multimodal"}],
            ":1",
            "the problem contains pictures, which prompts do not support; use text-only problems",
        ),
        ([OLYMPIAD, OLYMPIAD | {"id": 2, "error": "small"}], ":2", "'error' must be one number >= 0, or "),
        ([OLYMPIAD | {"error": "-1e-1"}], ":1", "got '-1e-1'"),
        ([OLYMPIAD | {"error": "nan"}], ":1", "got 'nan'"),
        ([OLYMPIAD | {"error": True}], ":1", "got True"),
        ([OLYMPIAD | {"error": "1,2,3"}], ":1", "2 (one per answer) separated by commas, got '1,2,3'"),
        ([OWN | {"strategy": ""}], ":1", "'strategy' must be a text"),
    ],
)
def test_an_invalid_benchmark_is_reported_with_file_and_line(
    tmp_path: Path, records: list[Any], line: str, reason: str
) -> None:
    path = write(tmp_path / "a.jsonl", records)
    with pytest.raises(DataError) as caught:
        open_benchmark("any", path, samples=1)
    assert str(caught.value).startswith(f"{path}{line}: ") and reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_digest_depends_on_the_content(tmp_path: Path) -> None:
    other = OWN | {"answer": "2"}
    files = [
        write(tmp_path / f"{i}.jsonl", records) for i, records in enumerate([[OWN], [OWN, other], [other, OWN], [OWN]])
    ]
    digests = [open_benchmark("any", path, samples=1).digest for path in files]
    assert digests[0] == digests[3] and len(set(digests)) == 3


@pytest.mark.parametrize("box", ["\\boxed{}", "\\boxed{ }", "First \\boxed{1}, then \\boxed{}."])
def test_an_empty_box_is_not_an_answer(tmp_path: Path, box: str) -> None:
    path = write(tmp_path / "a.jsonl", [AIME_BOXED, AIME_BOXED | {"id": "61", "solution": box}])
    with pytest.raises(
        DataError, match=r"a.jsonl:2: the content of the last \\boxed\{...\} must be a text that is not"
    ):
        open_benchmark("aime", path, samples=1)


@pytest.mark.parametrize("answers", [["$$"], ["3", "$$"], ["3", ""], [""]])
def test_an_empty_answer_of_a_list_is_refused(tmp_path: Path, answers: list[str]) -> None:
    path = write(tmp_path / "a.jsonl", [OLYMPIAD | {"final_answer": answers}])
    with pytest.raises(DataError, match="a.jsonl:1: the answer must be a text that is not empty"):
        open_benchmark("olympiad", path, samples=1)


def test_numbers_of_benchmarks_are_written_in_decimal_digits(tmp_path: Path) -> None:
    records = [AMC23 | {"id": number, "answer": value} for number, value in enumerate((1e-5, 3e17, 27.0, 0.1))]
    for suffix in ("jsonl", "parquet"):
        problems = open_benchmark("amc23", write(tmp_path / f"a.{suffix}", records), samples=1).problems
        assert [problem.answer for problem in problems] == ["0.00001", "300000000000000000", "27", "0.1"]
    path = tmp_path / "b.jsonl"
    path.write_text(json.dumps(AMC23 | {"answer": float("nan")}) + "\n")
    with pytest.raises(DataError, match="b.jsonl:1: the answer must be a finite number, got nan"):
        open_benchmark("amc23", str(path), samples=1)
