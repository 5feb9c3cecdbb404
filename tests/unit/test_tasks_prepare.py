"""`sgpo-async data prepare`: removed problems and the reasons, the split, and the files."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgpo_async.cli.main import main
from sgpo_async.config import load
from sgpo_async.errors import SgpoError
from sgpo_async.tasks.base import Problem
from sgpo_async.tasks.overlap import normalised, words_of
from sgpo_async.tasks.prepare import Prepared, Rules, prepare
from sgpo_async.tasks.sft_data import sft_data
from sgpo_async.tasks.sources import open_source

LONG = "A farmer has many sheep and a dog, and every day he walks with all of them to the river and back; {}"


def problem(text: str, answer: str = "1", *, response: str | None = "so", strategy: str | None = None) -> Problem:
    return Problem(id=text, problem=text, answer=answer, response=response, strategy=strategy)


def contents(problems: Any) -> list[tuple[Any, ...]]:
    return [(item.problem, item.answer, item.response, item.strategy) for item in problems]


def distinct(count: int) -> list[Problem]:
    """Problems that are not near-duplicates of each other."""
    return [problem(f"{'abcdefghij'[i % 10]}{i} plus {i * i}", str(i)) for i in range(count)]


TEXTS = st.lists(
    st.sampled_from(["sum", "of", "2", "3", "4", "x", "y", "+", "Find", "find", " "]), min_size=2, max_size=8
).map(lambda words: " ".join(["what", *words]))
PROBLEMS = st.lists(
    st.builds(problem, TEXTS, st.sampled_from("12"), response=st.sampled_from(["a", "a", "b", None])),
    min_size=3,
    max_size=25,
)
EVALUATION = st.lists(TEXTS, max_size=1).map(lambda texts: [("set", problem(text)) for text in texts])
RULES = st.builds(
    Rules,
    seed=st.integers(0, 3),
    sft_share=st.sampled_from([0.0, 0.1, 0.2, 1 / 3]),
    duplicate_words=st.integers(1, 3),
    duplicate_overlap=st.sampled_from([0.5, 0.8, 1.0]),
    contamination_words=st.integers(3, 6),
    contamination_overlap=st.sampled_from([0.0, 0.5]),
)


def outcome(problems: list[Problem], evaluation: list, rules: Rules) -> Prepared | str:
    try:
        return prepare(problems, evaluation, rules)
    except SgpoError as error:
        return str(error)


@settings(max_examples=200)
@given(PROBLEMS, EVALUATION, RULES, st.randoms(use_true_random=False))
def test_the_sets_are_a_partition_that_does_not_depend_on_the_order_of_lines(
    problems: list[Problem], evaluation: list, rules: Rules, rng: random.Random
) -> None:
    prepared = outcome(problems, evaluation, rules)
    again = outcome(rng.sample(problems, len(problems)), evaluation, rules)
    if isinstance(prepared, str) or isinstance(again, str):
        assert prepared == again
        assert "\n" not in str(prepared)
        return
    sets = (prepared.sft, prepared.validation, prepared.rl)
    all_contents = [
        *contents(item for part in sets for item in part),
        *contents(removal.problem for removal in prepared.removed),
    ]
    assert Counter(all_contents) == Counter(contents(problems))
    texts = [normalised(item.problem) for part in sets for item in part]
    assert len(texts) == len(set(texts))
    assert [contents(part) for part in sets] == [contents(part) for part in (again.sft, again.validation, again.rl)]
    assert Counter(removal.reason for removal in prepared.removed) == Counter(
        removal.reason for removal in again.removed
    )
    kept = len(texts)
    assert len(prepared.sft) + len(prepared.validation) == round(rules.sft_share * kept)
    assert all(item.response for item in [*prepared.sft, *prepared.validation])


def test_by_default_a_third_is_for_the_warm_up_and_a_tenth_of_that_for_validation_as_in_the_paper() -> None:
    prepared = prepare(distinct(900), [], Rules())
    assert (len(prepared.sft), len(prepared.validation), len(prepared.rl), prepared.removed) == (270, 30, 600, [])


def test_different_seeds_draw_the_warm_up_independently() -> None:
    first, second = (prepare(distinct(900), [], Rules(seed=seed)) for seed in (0, 1))
    both = {item.id for item in (*first.sft, *first.validation)} & {
        item.id for item in (*second.sft, *second.validation)
    }
    assert 70 <= len(both) <= 130  # a third of a third of 900 is expected; the standard deviation is 7


def test_additional_problems_move_few_others_to_another_set() -> None:
    before, after = prepare(distinct(300), [], Rules()), prepare(distinct(303), [], Rules())
    assert len({item.id for item in before.rl} & {item.id for item in after.rl}) >= 197


def test_the_warm_up_contains_only_problems_with_a_response() -> None:
    problems = [*distinct(6), *(problem(f"bare {i} of {i}", str(i), response=None) for i in range(12))]
    prepared = prepare(problems, [], Rules())
    assert sorted(item.id for item in (*prepared.sft, *prepared.validation)) == sorted(item.id for item in distinct(6))


def test_the_duplicate_with_response_and_strategy_is_kept() -> None:
    texts = ("What is it?", "what  IS it?", "What\nis it?")
    variants = [problem(texts[0], response=None), problem(texts[1], strategy="s"), problem(texts[2])]
    prepared = prepare([*variants, *distinct(9)], [], Rules())
    assert sorted(removal.problem.id for removal in prepared.removed) == sorted([texts[0], texts[2]])
    assert {removal.like.id for removal in prepared.removed} == {texts[1]}
    assert {removal.reason for removal in prepared.removed} == {"duplicate"}


def test_duplicates_with_different_answers_are_removed_for_a_separate_reason() -> None:
    prepared = prepare([problem("What?", "1"), problem("what?", "2"), *distinct(9)], [], Rules())
    assert [removal.reason for removal in prepared.removed] == ["duplicate with another answer"]


@pytest.mark.parametrize(
    ("text", "answer", "removed"),
    [
        (LONG.format("how far do they walk in 3 days in all?"), "1", True),
        (LONG.format("how far do they walk in 4 days in total?"), "1", False),  # another number
        (LONG.format("how far do they walk in 3 days in all?"), "2", False),  # another answer
        ("Something else with 3", "1", False),
    ],
)
def test_a_near_duplicate_is_removed_only_if_its_numbers_and_answer_are_equal(
    text: str, answer: str, removed: bool
) -> None:
    first = problem(LONG.format("how far do they walk in 3 days in total?"), response="so", strategy="s")
    prepared = prepare([first, problem(text, answer), *distinct(9)], [], Rules())
    found = [(removal.problem.problem, removal.reason, removal.like) for removal in prepared.removed]
    assert found == ([(text, "near-duplicate", first)] if removed else [])


def test_contamination_is_found_in_either_direction_above_the_given_overlap() -> None:
    evaluation = [("aime", problem(LONG.format("how far in 3 days?"))), ("math", problem("Compute 3 to the power 7"))]
    contaminated = [
        problem(LONG.format("what is the name of the dog, if the name of the river is nowhere written down at all?")),
        problem("Please compute: 3 to the power 7, and halve it."),
        problem("in 3 days?"),
    ]
    strict = prepare([*contaminated, *distinct(9)], evaluation, Rules())
    assert {(removal.problem.id, removal.evaluation) for removal in strict.removed} == {
        (contaminated[0].id, "aime"), (contaminated[1].id, "math"), (contaminated[2].id, "aime")
    }  # fmt: skip
    assert all(removal.shared in " ".join(words_of(removal.problem.problem)) for removal in strict.removed)
    lax = prepare([*contaminated, *distinct(9)], evaluation, Rules(contamination_overlap=0.95))
    assert {removal.problem.id for removal in lax.removed} == {contaminated[1].id, contaminated[2].id}


# tests of the command


def record(item: Problem) -> dict[str, Any]:
    return {"problem": item.problem, "answer": item.answer, "response": item.response, "level": 3}


def write(path: Path, problems: list[Problem]) -> str:
    path.write_text("".join(json.dumps(record(item)) + "\n" for item in problems))
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_written_files_can_be_used_as_task_sources(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "mine.jsonl", [*distinct(30), distinct(1)[0]])
    known = write(tmp_path / "known.jsonl", [distinct(30)[29]])
    out = tmp_path / "out"
    assert main(["data", "prepare", file, "--out", str(out), "--benchmark", f"k={known}", "--format", suffix]) == 0
    output = capsys.readouterr().out
    assert "read 31 problems, removed 2\n  1 contamination\n  1 duplicate\n" in output
    assert "columns that are not kept: level" in output
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["removed"] == {"contamination": 1, "duplicate": 1}
    assert manifest["sources"][0]["ignored_columns"] == ["level"]
    assert {name: facts["problems"] for name, facts in manifest["sets"].items()} == {
        "sft": 9,
        "sft-validation": 1,
        "rl": 19,
    }
    texts = set()
    for name, facts in manifest["sets"].items():
        source = open_source("file", path=str(out / f"{name}.{suffix}"), held_out=0, seed=0)
        problems = [source.training(i) for i in range(facts["problems"])]
        assert sum(item.response is not None for item in problems) == facts["with_response"]
        texts |= {item.problem for item in problems}
    assert texts == {item.problem for item in distinct(29)}
    sets = [f"sft.path={out}/sft.{suffix}", f"sft.validation={out}/sft-validation.{suffix}"]
    warm_up = sft_data(load("configs/paper-qwen2.5-7b.yaml", sets))
    assert (len(warm_up.training), len(warm_up.validation), warm_up.without) == (9, 1, 0)
    duplicate, contamination = read(out / "removed.jsonl")
    assert (duplicate["reason"], duplicate["like"]) == ("duplicate", f"{file}:1")
    assert (contamination["benchmark"], contamination["source"], contamination["overlap"]) == ("k", f"{file}:30", 1.0)


def test_the_same_arguments_write_the_same_bytes(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.jsonl", distinct(30))
    for name in ("one", "two"):
        assert main(["data", "prepare", file, "--out", str(tmp_path / name), "--seed", "5"]) == 0
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["manifest.json", "removed.jsonl", "rl.jsonl", "sft-validation.jsonl", "sft.jsonl"]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)


def test_without_a_warm_up_all_problems_are_for_rl_and_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.jsonl", distinct(5))
    arguments = ["data", "prepare", file, "--out", str(tmp_path / "out"), "--sft-share", "0"]
    assert main([*arguments, "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "removed.jsonl", "rl.jsonl"]


@pytest.mark.parametrize(
    ("count", "arguments", "parts"),
    [
        (30, ["--sft-share", "1"], ["--sft-share must be in [0, 1), got 1.0"]),
        (30, ["--validation-share", "0"], ["--validation-share must be in (0, 1), got 0.0"]),
        (30, ["--duplicate-overlap", "1.5"], ["--duplicate-overlap must be in (0, 1], got 1.5"]),
        (30, ["--duplicate-words", "0"], ["--duplicate-words must be >= 1, got 0"]),
        (30, ["--contamination-overlap", "1"], ["--contamination-overlap must be in [0, 1), got 1.0"]),
        (30, ["--contamination-words", "0"], ["--contamination-words must be >= 1, got 0"]),
        (30, ["--benchmark", "math500"], ["--benchmark 'math500'", "NAME=FILE"]),
        (30, ["--benchmark", "m=none.jsonl"], ["none.jsonl", "no such file"]),
        (3, [], ["--sft-share 0.333", "1 for the warm-up", "--sft-share 0"]),
        (0, [], ["of 0 problems none is left"]),
    ],
)
def test_an_invalid_argument_is_reported_in_one_line(
    tmp_path: Path, count: int, arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "mine.jsonl", distinct(count))
    assert main(["data", "prepare", file, "--out", str(tmp_path / "out"), *arguments]) == 2
    output = capsys.readouterr().err
    assert output.startswith("error: ") and output.count("\n") == 1
    assert all(part in output for part in parts), output
    assert not (tmp_path / "out").exists()


def test_the_error_for_too_few_responses_suggests_a_share_that_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = [problem(f"bare {i} of {i}", str(i), response=None) for i in range(20)]
    file = write(tmp_path / "mine.jsonl", [*distinct(4), *bare])
    arguments = ["data", "prepare", file, "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    output = capsys.readouterr().err
    assert "8 of 24 problems are for the warm-up, but only 4 have a response" in output
    share = output.rstrip().rpartition(" ")[2]
    assert main([*arguments, "--sft-share", share]) == 0


def test_existing_files_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "prepare", write(tmp_path / "mine.jsonl", distinct(30)), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert "it has results already; choose another --out folder, or remove this one" in capsys.readouterr().err


@pytest.mark.process
def test_other_column_names_are_read_and_answers_that_no_verifier_accepts_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.jsonl"
    answers = ["72", "\\$36", "\\boxed{}", "1,000"]
    records = [{"question": f"{'abcd'[i]} plus {i}", "answer": f"So.\n#### {text}"} for i, text in enumerate(answers)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    columns = ["--column", "problem=question", "--column", "response=answer", "--answer-after", "####"]
    arguments = ["data", "prepare", str(file), "--out", str(tmp_path / "out"), *columns]
    assert main([*arguments, "--sft-share", "0"]) == 0
    output = capsys.readouterr().out
    assert f"1 of 4 answers are not correct by their own verifier: {file}:3 '\\\\boxed{{}}'" in output
    assert "columns that are not kept" not in output
    written = {record["answer"]: record["response"] for record in read(tmp_path / "out" / "rl.jsonl")}
    assert written == {text: f"So.\n#### {text}" for text in answers}
    for column in ("question", "question=problem", "problem="):
        assert main(["data", "prepare", str(file), "--out", str(tmp_path / "none"), "--column", column]) == 2
        assert "must be OURS=THEIRS, with one of problem, answer, strategy, response as OURS" in capsys.readouterr().err
