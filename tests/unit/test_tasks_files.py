"""Problems from files: reading, errors with line numbers, held-out split and epochs."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from sgpo_async.errors import DataError
from sgpo_async.tasks.files import FileSource
from sgpo_async.tasks.sources import open_source


def write_jsonl(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def sums(count: int) -> list[dict[str, Any]]:
    return [{"problem": f"{i} + {i}", "answer": 2 * i, "strategy": "Double it."} for i in range(count)]


def test_known_columns_are_read_and_others_are_ignored(tmp_path: Path) -> None:
    records = [{"problem": "1+1", "answer": "2", "strategy": "add", "response": "It is 2.", "extra": 1}]
    problem = FileSource(write_jsonl(tmp_path / "a.jsonl", records), held_out=0, seed=0).training(0)
    assert (problem.problem, problem.answer) == ("1+1", "2")
    assert (problem.strategy, problem.response) == ("add", "It is 2.")


def test_optional_columns_may_be_absent_or_null(tmp_path: Path) -> None:
    records = [{"problem": "1+1", "answer": 2, "strategy": None}]
    problem = FileSource(write_jsonl(tmp_path / "a.jsonl", records), held_out=0, seed=0).training(0)
    assert (problem.answer, problem.strategy, problem.response) == ("2", None, None)


def test_parquet_and_jsonl_give_the_same_training_problems(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(sums(10)), tmp_path / "a.parquet")
    jsonl = FileSource(write_jsonl(tmp_path / "a.jsonl", sums(10)), held_out=2, seed=1)
    parquet_file = FileSource(str(tmp_path / "a.parquet"), held_out=2, seed=1)
    assert [jsonl.training(i).problem for i in range(20)] == [parquet_file.training(i).problem for i in range(20)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "not JSON"),
        ("[1, 2]", "a record must be an object, got list"),
        ('{"question": "1+1", "answer": "2"}', "no column 'problem'; there are 'question', 'answer'"),
        ('{"problem": "1+1"}', "no column 'answer'"),
        ('{"problem": " ", "answer": "2"}', "'problem' must be a text that is not empty"),
        ('{"problem": "1+1", "answer": true}', "'answer' must be a text"),
        ('{"problem": "1+1", "answer": "2", "strategy": 3}', "'strategy' must be a text"),
        (
            r'{"problem": "1+1 \ud835", "answer": "2"}',
            "'problem' must be valid Unicode, got half a surrogate pair at character 4",
        ),
        ("\xff", "byte 1 is not UTF-8; convert the file"),
    ],
)
def test_a_bad_line_is_reported_with_file_and_line(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"problem": "1+1", "answer": "2"}\n\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(DataError) as caught:
        FileSource(str(path), held_out=0, seed=0)
    assert str(caught.value).startswith(f"{path}:3: {reason}")
    assert "\n" not in str(caught.value)


def test_an_invalid_parquet_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"text")
    with pytest.raises(DataError, match="not readable as Parquet"):
        FileSource(str(tmp_path / "a.parquet"), held_out=0, seed=0)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        FileSource(str(tmp_path / "none.jsonl"), held_out=0, seed=0)


def test_each_epoch_has_the_same_problems_in_a_new_order(tmp_path: Path) -> None:
    source = FileSource(write_jsonl(tmp_path / "a.jsonl", sums(20)), held_out=5, seed=5)
    first, second = ([source.training(epoch * 15 + i).problem for i in range(15)] for epoch in range(2))
    assert sorted(first) == sorted(second)
    assert first != second
    again = FileSource(str(tmp_path / "a.jsonl"), held_out=5, seed=5)
    assert [again.training(15 + i).problem for i in range(15)] == second


def test_held_out_problems_are_never_trained_on_even_if_they_occur_twice(tmp_path: Path) -> None:
    source = FileSource(write_jsonl(tmp_path / "a.jsonl", sums(20) * 2), held_out=5, seed=5)
    held_out = {problem.problem for problem in source.held_out()}
    assert len(held_out) == 5
    assert len(source.held_out()) == 10
    assert held_out.isdisjoint(source.training(i).problem for i in range(30))


def test_the_held_out_problems_do_not_depend_on_the_seed_of_the_run(tmp_path: Path) -> None:
    """Otherwise runs with different seeds could not be compared, and would train on each other's held-out problems."""
    path = write_jsonl(tmp_path / "a.jsonl", sums(40))
    first, second = (FileSource(path, held_out=10, seed=seed) for seed in (0, 1))
    assert first.held_out() == second.held_out()
    assert [first.training(i) for i in range(30)] != [second.training(i) for i in range(30)]


def test_both_halves_of_the_held_out_problems_are_random_samples_of_a_sorted_file(tmp_path: Path) -> None:
    """Experiments validate with the first half and test with the second."""
    source = FileSource(write_jsonl(tmp_path / "a.jsonl", sums(2000)), held_out=400, seed=0)
    answers = [int(problem.answer) / 2 for problem in source.held_out()]
    first, second = (sum(half) / 200 for half in (answers[:200], answers[200:]))
    assert abs(first - second) < 3 * 58  # its standard error is 58; in file order the difference is 1000


def test_copies_of_a_held_out_problem_are_adjacent(tmp_path: Path) -> None:
    source = FileSource(write_jsonl(tmp_path / "a.jsonl", sums(20) * 2), held_out=5, seed=0)
    texts = [problem.problem for problem in source.held_out()]
    assert texts[0::2] == texts[1::2]


def test_holding_out_all_problems_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none for training"):
        FileSource(write_jsonl(tmp_path / "a.jsonl", sums(1)), held_out=1, seed=0)


def test_the_kind_selects_the_source_and_its_verifier(tmp_path: Path) -> None:
    assert open_source("cues", path="", held_out=4, seed=0).verifier == "cues"
    path = write_jsonl(tmp_path / "a.jsonl", sums(4))
    source = open_source("file", path=path, held_out=2, seed=0)
    assert source.verifier == "math"
    assert len(source.held_out()) == 2


def test_the_train_split_of_a_hugging_face_dataset_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str) -> dict[str, Any]:
        return {"train": sums(3), "test": []} if name == "someone/sums" else {"test": sums(3)}

    library = SimpleNamespace(load_dataset=load_dataset, DatasetDict=dict)
    monkeypatch.setitem(sys.modules, "datasets", library)
    source = FileSource("someone/sums", held_out=0, seed=0)
    assert sorted(source.training(i).problem for i in range(3)) == ["0 + 0", "1 + 1", "2 + 2"]
    with pytest.raises(DataError, match="no dataset with a train split"):
        FileSource("someone/else", held_out=0, seed=0)


def test_the_error_for_a_missing_datasets_library_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        FileSource("someone/problems", held_out=0, seed=0)
