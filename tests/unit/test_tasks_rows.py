"""Rows of files: every format, lazily, with errors that name file and line; names of columns; numbers as answers."""

import gzip
import json
import random
import sys
import tracemalloc
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from sgpo_async.config import Tasks
from sgpo_async.errors import ConfigError, DataError
from sgpo_async.tasks import rows
from sgpo_async.tasks.files import FileSource, read_problems
from sgpo_async.tasks.records import Form, number_text
from sgpo_async.tasks.rows import open_rows
from sgpo_async.tasks.sources import open_source

GSM8K = [
    {"question": "What is 70 + 2?", "answer": "It is 70 + 2 = <<70+2=72>>72.\n#### 72"},
    {"question": "What is 500 + 500?", "answer": "Twice 500.\n#### 1,000"},
    {"question": "What is 3 + 2?", "answer": "Count on from 3.\n#### 5"},
]
GSM8K_TASKS = Tasks(
    source="file", path="x", columns={"problem": "question", "response": "answer"}, answer_after="####", held_out=1
)


def sums(count: int) -> list[dict[str, Any]]:
    return [{"problem": f"{i} + {i}", "answer": str(2 * i), "strategy": "Double it."} for i in range(count)]


def text_of(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write(path: Path, records: list[dict[str, Any]]) -> str:
    """Write records in the format that the name says."""
    name, names = path.name.lower(), list(records[0])
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=7)
        return str(path)
    quoted = (",".join('"{}"'.format(str(record[n]).replace('"', '""')) for n in names) for record in records)
    text = "\r\n".join([",".join(names), *quoted]) + "\r\n" if ".csv" in name else text_of(records)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(path)


FORMATS = ["a.jsonl", "a.JSONL", "a.jsonl.gz", "a.csv", "a.CSV", "a.csv.gz", "a.parquet", "a.Parquet"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_records_in_any_order(tmp_path: Path, name: str) -> None:
    records = [record | {"problem": f'{record["problem"]},\n"é"'} for record in sums(30)]
    found = open_rows(write(tmp_path / name, records))
    assert [record for _, record in found] == records
    order = random.Random(0).sample(range(30), 30)
    assert [found[index][1] for index in order] == [records[index] for index in order]
    assert [record for _, record in found[3:6]] == records[3:6]
    for index in (30, -1):
        with pytest.raises(IndexError):
            found[index]


def test_places_are_lines_of_the_file(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b'\n{"a": 1}\r\n\r\n{"a": 2}\r{"a": 3}')
    assert list(open_rows(str(lines))) == [(f"{lines}:2", {"a": 1}), (f"{lines}:4", {"a": 2}), (f"{lines}:5", {"a": 3})]
    values = tmp_path / "a.csv"
    values.write_bytes(b'\xef\xbb\xbfa,b\n1,"two\nlines"\n\n3,\n')
    assert list(open_rows(str(values))) == [
        (f"{values}:2", {"a": "1", "b": "two\nlines"}),
        (f"{values}:5", {"a": "3", "b": None}),
    ]


def test_the_order_of_training_and_held_out_problems_is_that_of_earlier_releases(tmp_path: Path) -> None:
    """A run that is resumed after an upgrade must not train on a held-out problem."""
    records = sums(12)
    source = FileSource(write(tmp_path / "a.jsonl", records + records[::3]), held_out=3, seed=7)
    lines = [int(problem.id.rpartition(":")[2]) for problem in source.held_out()]
    order = [int(source.training(position).id.rpartition(":")[2]) for position in range(24)]
    assert lines == [1, 13, 8, 6]
    assert order == [2, 10, 4, 5, 7, 16, 15, 9, 11, 14, 12, 3, 12, 5, 9, 7, 14, 16, 2, 11, 3, 10, 4, 15]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_the_memory_for_a_file_does_not_grow_with_its_size(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times the bytes in as many records: the memory that opening and reading take stays the same."""
    monkeypatch.setattr(rows, "CACHED_BYTES", 2**18)
    peaks, sizes = [], []
    for length in (5_000, 20_000):
        records = [record | {"response": chr(97 + i % 26) * length} for i, record in enumerate(sums(400))]
        path = write(tmp_path / f"{length}-{name}", records)
        del records
        sizes.append(_uncompressed(path))
        FileSource(write(tmp_path / f"warm-{name}", sums(8)), held_out=2, seed=0)
        pyarrow.default_memory_pool().release_unused()
        before, arrow = tracemalloc_start(), pyarrow.total_allocated_bytes()
        source = FileSource(path, held_out=4, seed=0)
        for position in range(50):
            source.training(position)
        peaks.append(tracemalloc.get_traced_memory()[1] - before + pyarrow.total_allocated_bytes() - arrow)
        tracemalloc.stop()
    assert sizes[1] > 3 * sizes[0] > 5_000_000
    assert peaks[1] < sizes[1] / 8, "a part of the file at a time"


def tracemalloc_start() -> int:
    tracemalloc.start()
    return tracemalloc.get_traced_memory()[0]


def _uncompressed(path: str) -> int:
    if not path.endswith("parquet"):
        return Path(path).stat().st_size
    meta = parquet.ParquetFile(path).metadata
    return sum(len(record["response"]) for _, record in open_rows(path)) if meta.num_rows else 0


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_file_that_changes_during_a_run_is_an_error(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, sums(20))
    source = FileSource(path, held_out=2, seed=0)
    with Path(path).open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match="the file has changed since it was opened; start again"):
        source.training(0)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", '{"problem": "caf\xe9", "answer": 1}\n'.encode("latin-1"), ":1: byte 17 is not UTF-8; convert"),
        ("a.csv", "problem,answer\n1+1,2\ncaf\xe9,1\n".encode("latin-1"), ":3: byte 4 is not UTF-8; convert the file"),
        ("a.jsonl", b'{"problem": "x", "answer": 1, "u": ' + b"[" * 2000 + b"]" * 2000 + b"}", ":1: the JSON is"),
        ("a.jsonl", b'{"problem": "x", "answer": ' + b"9" * 5000 + b"}", ":1: not JSON: Exceeds the limit"),
        ("a.csv", b'problem,answer\n1+1,2,3\n', ":2: 3 fields, but the header has 2; quote commas"),
        ("a.csv", b'problem,answer\n1+1\n', ":2: 1 fields, but the header has 2"),
        ("a.csv", b'problem,answer\n"1+1,2\n', ":2: not CSV: unexpected end of data"),
        ("a.csv", b'problem,problem\n1,2\n', ":1: the header has a name twice"),
        ("a.csv", b'problem,answer\n1+1,\n', ":2: 'answer' must be a text that is not empty, got None"),
        ("a.jsonl.gz", b'{"problem": "x", "answer": 1}', ": cannot be unpacked: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"problem": "x", "answer": 1}' * 99, mtime=0)[:-20], ": cannot be unpacked: "),
        ("a.parquet", b"text", ": not readable as Parquet"),
        ("a.jsonl", b"", ": 0 distinct problems leave none for training"),
        ("a.csv", b"", ": 0 distinct problems leave none for training"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line_with_file_and_line(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        FileSource(str(path), held_out=0, seed=0)
    assert str(caught.value).startswith(f"{path}{reason}") and "\n" not in str(caught.value)


def test_nested_json_in_an_unused_column_is_read_as_long_as_python_can(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"problem": "x", "answer": 1, "unused": ' + "[" * 200 + "]" * 200 + "}\n")
    assert read_problems(str(path))[0].answer == "1"


NUMBERS = [
    (0.00001, "0.00001"), (3e17, "300000000000000000"), (1e-12, "0.000000000001"), (27.0, "27"), (-0.5, "-0.5"),
    (1e22, "10000000000000000000000"), (123456789012345678901234567890, "123456789012345678901234567890"), (0, "0"),
    (100, "100"), (100.0, "100"), (Decimal("1E-7"), "0.0000001"), (Decimal("2.50"), "2.5"), (1.5, "1.5"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "digits"), NUMBERS)
def test_a_number_as_an_answer_is_written_in_decimal_digits(value: Any, digits: str) -> None:
    assert number_text("here", "'answer'", value) == digits


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_numbers_of_files_are_written_in_decimal_digits(tmp_path: Path, suffix: str) -> None:
    values = [(value, digits) for value, digits in NUMBERS if isinstance(value, float)]
    path = write(
        tmp_path / f"a.{suffix}", [{"problem": f"p{i}", "answer": value} for i, (value, _) in enumerate(values)]
    )
    assert [problem.answer for problem in read_problems(path)] == [digits for _, digits in values]


def test_numbers_of_32_bits_keep_their_digits(tmp_path: Path) -> None:
    table = pyarrow.table({"problem": ["a", "b"], "answer": pyarrow.array([0.1, 1e-5], pyarrow.float32())})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert [problem.answer for problem in read_problems(str(tmp_path / "a.parquet"))] == ["0.1", "0.00001"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_not_finite_is_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"problem": "x", "answer": 1}}\n{{"problem": "y", "answer": {value}}}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2: 'answer' must be a finite number, got (nan|-?inf)"):
        read_problems(str(path))
    table = pyarrow.table({"problem": ["a"], "answer": [float(value)]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet:1: 'answer' must be a finite number"):
        read_problems(str(tmp_path / "a.parquet"))


def test_problems_in_the_form_of_gsm8k_are_read_with_their_solutions_as_responses(tmp_path: Path) -> None:
    form = Form.of(GSM8K_TASKS)
    problems = read_problems(write(tmp_path / "a.jsonl", GSM8K), form=form)
    assert [problem.problem for problem in problems] == [record["question"] for record in GSM8K]
    assert [problem.answer for problem in problems] == ["72", "1,000", "5"]
    assert [problem.response for problem in problems] == [record["answer"] for record in GSM8K]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"question": "?", "answer": "no mark"}, "'answer' must have an answer after '####'"),
        ({"question": "?", "answer": "#### "}, "'answer' must have an answer after '####'"),
        ({"question": "?", "answer": ""}, "'answer' must be a text that is not empty"),
    ],
)
def test_an_answer_without_its_mark_is_reported(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    path = write(tmp_path / "a.jsonl", [GSM8K[0], record])
    with pytest.raises(DataError) as caught:
        read_problems(path, form=Form.of(GSM8K_TASKS))
    assert str(caught.value).startswith(f"{path}:2: {reason}")


@pytest.mark.parametrize(
    ("record", "columns", "proposal"),
    [
        ({"question": "?", "answer": "1"}, {}, "set tasks.columns={problem: question}"),
        ({"Problem": "?", "answer": "1"}, {}, "set tasks.columns={problem: Problem}"),
        ({"problem": "?", "final_answer": "1"}, {}, "set tasks.columns={answer: final_answer}"),
        ({"prompt": "?", "target": "1"}, {"problem": "prompt"}, "set tasks.columns={problem: prompt, answer: target}"),
        ({"x": "?", "answer": "1"}, {}, "set tasks.columns={problem: THEIR-NAME}"),
        ({"question": "?", "answer": "1"}, {"problem": "qestion"}, "set tasks.columns={problem: question}"),
    ],
)
def test_the_error_for_a_missing_column_proposes_a_mapping(
    tmp_path: Path, record: dict[str, Any], columns: dict[str, str], proposal: str
) -> None:
    path = write(tmp_path / "a.jsonl", [record])
    with pytest.raises(DataError, match=f"a.jsonl:1: no column .*; {proposal}$".replace("{", r"\{")):
        read_problems(path, form=Form(columns=columns, is_set=True))


def test_a_file_whose_columns_no_key_names_has_another_remedy(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "?", "answer": "1"}])
    with pytest.raises(DataError, match=r"a\.jsonl:1: no column 'problem'; .*; rename the column to 'problem'$"):
        read_problems(path)


def test_other_columns_are_kept_only_for_a_reward_function_of_the_user(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", [{"problem": f"p{i}", "answer": 1, "level": i, "tests": [1, None]} for i in (0, 1)]
    )
    for reward, kept in (("", ""), ("math", ""), ("my:reward", '{"level": 0, "tests": [1, null]}')):
        tasks = Tasks(source="file", path=path, reward=reward, held_out=1)
        source = open_source("file", path=path, held_out=0, seed=0, tasks=tasks)
        assert {source.training(i).problem: source.training(i).columns for i in (0, 1)}["p0"] == kept
        assert source.verifier == (reward or "math")


def test_an_environment_gets_the_other_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"problem": "p", "answer": 1, "level": 2}])
    tasks = Tasks(source="file", path=path, environment="my:Environment", held_out=1)
    assert open_source("file", path=path, held_out=0, seed=0, tasks=tasks).training(0).columns == '{"level": 2}'


def test_all_problems_of_a_source_are_checked_at_its_start_and_read_lazily(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text_of(sums(3)) + "not JSON\n")
    with pytest.raises(DataError, match="a.jsonl:4: not JSON"):
        open_source("file", path=str(path), held_out=1, seed=0)
    path.write_text(text_of(sums(30)) + json.dumps({"problem": "a long one" * 9, "answer": 1, "strategy": "s"}) + "\n")
    source = open_source("file", path=str(path), held_out=0, seed=0)
    problems = source.training_problems()
    assert (len(problems), [one.problem for one in problems[:2]]) == (31, ["0 + 0", "1 + 1"])
    assert [one.problem for one in source.longest_problems(1)] == ["a long one" * 9]
    assert (source.strategies, source.responses) == (31, 0)


def test_settings_of_datasets_are_refused_for_files(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", sums(3))
    with pytest.raises(DataError, match=r"tasks.split is for Hugging Face datasets"):
        open_rows(path, split="test")
    with pytest.raises(
        ConfigError, match="tasks.columns must map only problem, answer, strategy, response, got 'ansr'"
    ):
        Tasks(source="file", path="a.jsonl", columns={"ansr": "answer"})


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    return pytest.importorskip("datasets")


def test_a_dataset_is_read_by_configuration_and_split(tmp_path: Path, datasets: Any) -> None:
    """Local folders, as a dataset of the hub is laid out."""
    for split, count in (("train", 5), ("test", 3)):
        (tmp_path / "own").mkdir(exist_ok=True)
        write(tmp_path / "own" / f"{split}.jsonl", sums(count))
    found = open_rows(str(tmp_path / "own"))
    assert [record["problem"] for _, record in found] == [record["problem"] for record in sums(5)]
    assert found[2] == (f"{tmp_path / 'own'}:3", {"problem": "2 + 2", "answer": "4", "strategy": "Double it."})
    assert len(open_rows(str(tmp_path / "own"), split="test")) == 3
    with pytest.raises(DataError, match="no dataset with a nosuch split; there are train, test: set tasks.split"):
        open_rows(str(tmp_path / "own"), split="nosuch")
    with pytest.raises(DataError, match="own: cannot be read as a dataset: .*nosuch"):
        open_rows(str(tmp_path / "own"), config="nosuch")
    datasets.load_dataset(str(tmp_path / "own")).save_to_disk(tmp_path / "saved")
    assert len(open_rows(str(tmp_path / "saved"))) == 5 and len(open_rows(str(tmp_path / "saved"), split="test")) == 3
    source = FileSource(str(tmp_path / "own"), held_out=1, seed=0, part=("", "test"))
    assert {source.training(i).answer for i in range(2)} | {one.answer for one in source.held_out()} == {"0", "2", "4"}


def test_a_missing_file_and_a_missing_library_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no such file"):
        open_rows(str(tmp_path / "none.CSV"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="not .jsonl, .csv or .parquet, and a Hugging Face dataset needs `pip install"):
        open_rows("someone/problems")
