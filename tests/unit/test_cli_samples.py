"""`sgpo-async samples` chooses and prints groups; what a model wrote is shown, never interpreted."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from sgpo_async.cli.main import main
from sgpo_async.cli.sample_text import render
from sgpo_async.files import to_json
from sgpo_async.metrics.samples import SAMPLES
from sgpo_async.report.completions import completions, samples_page
from sgpo_async.report.texts import LEFT_OUT, runs_of, strength

HOSTILE = [
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "[bold]markup[/bold] [/]",
    "漢字かな" * 40,
    "🙂" * 60,
    "a\rb\x08c\x00",
    "\u202egnp.exe",
    "<script>alert(1)</script> & \"quoted\" 'text'",
    "line one\nline two\n\n✓ 7 26 forged row",
    ":smile: :warning:",
    "x" * 500,
    "\ud800",
    "",
]


def rollout(slot: int, text: str, **values: Any) -> dict[str, Any]:
    plain = {"reward": 0.0, "finish": "stop", "tokens": 7, "versions": [3], "ends": [7], "guided": slot >= 2} | values
    return {"slot": slot, "text": text, "correct": plain["reward"] > 0.5} | plain


def distilled(text: str, **values: Any) -> dict[str, Any]:
    pieces = [text[:3], text[3:5], "", text[5:]]
    return rollout(2, text, reward=1.0, pieces=pieces, kl=[0.0, 0.4, 0.01, 2.5], versions=[3, 4], **values)


def sample(step: int = 1, text: str = "alone", **values: Any) -> dict[str, Any]:
    group = {"step": step, "task": 16 * step, "version": step - 1, "problem": f"problem {step}", "answer": "12"}
    rollouts = [rollout(0, text), rollout(1, text, finish="length"), distilled(text), rollout(3, text)]
    return group | {"strategy": "add them", "alpha": 0.8, "rollouts": rollouts} | values


def printed(group: dict[str, Any], *, width: int = 100, terminal: bool = False, chars: int = 0) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, markup=False, emoji=False, highlight=False)
    console.print(render(group, chars=chars))
    return file.getvalue()


def write(folder: Path, *groups: dict[str, Any]) -> Path:
    (folder / SAMPLES).write_text("".join(to_json(group) + "\n" for group in groups))
    return folder


def test_a_group_is_printed_with_everything_that_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(sample(text="3 yarrow swap"))
    for expected in ("step 1", "task 16", "alpha 0.80", "problem 1", "add them", "12", "alone: 0 of 2 correct"):
        assert expected in text.replace("0.800", "0.80"), expected
    assert "with the strategy: 1 of 2 correct" in text
    assert text.count("3 yarrow swap") == 4
    assert text.count("✓") == 1 and text.count("✗") == 3
    assert "3-4" in text and "[cut off: max_new_tokens]" in text
    assert "divergence in nats: mean 0.728, largest 'row swap' 2.50" in re.sub(r"\s+", " ", text)


def test_rewards_other_than_0_and_1_are_shown() -> None:
    rollouts = [rollout(slot, "text", reward=reward) for slot, reward in enumerate((0.0, 1.0, 0.25, -2.0))]
    for shown in (printed(sample(rollouts=rollouts)), completions([sample(rollouts=rollouts)])):
        assert re.findall(r"reward (-?[\d.]+)", shown) == ["0.250", "-2.00"]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("width", [40, 80, 133])
def test_what_a_model_wrote_cannot_control_a_terminal(text: str, width: int) -> None:
    group = sample(text=text, problem=text, strategy=text, answer=text)
    plain = printed(group, width=width)
    assert all(c.isprintable() or c == "\n" for c in plain)
    assert all(cell_len(line) <= width for line in plain.splitlines())
    colours = re.sub(r"\x1b\[[\d;]*m", "", printed(group, width=width, terminal=True))
    assert colours == plain, "only colours differ"
    squeezed = re.sub(r"\s", "", plain)
    for word in ("[bold]", "<script>", ":smile:"):
        assert (word in text) == (word in squeezed)


def test_a_forged_line_stays_within_its_column() -> None:
    lines = printed(sample(text="honest\n✓       1      26  forged")).splitlines()
    assert [line for line in lines if line.startswith("✓")] == [line for line in lines if "3-4" in line]


@pytest.mark.parametrize(("kl", "colour"), [(0.05, None), (0.1, "43"), (0.99, "43"), (1.0, "41"), (9.0, "41")])
def test_tokens_are_highlighted_by_their_divergence(kl: float, colour: str | None) -> None:
    group = sample()
    group["rollouts"] = [rollout(2, "ab", reward=1.0, pieces=["a", "b"], kl=[0.0, kl])]
    text = printed(group, terminal=True)
    assert re.findall(r"\x1b\[30;(\d+)mb", text) == ([colour] if colour else [])


def test_the_middle_of_a_long_completion_is_left_out() -> None:
    whole = "".join(f"{i:04}" for i in range(1000))
    for one in (rollout(0, whole), rollout(2, whole, pieces=re.findall("....", whole), kl=[0.5] * 1000)):
        assert "".join(run.text for run in runs_of(one, chars=0)) == whole
        assert "".join(run.text for run in runs_of(one, chars=4000)) == whole
        cut = "".join(run.text for run in runs_of(one, chars=101))
        assert cut == f"{whole[:50]} [... 3,900 characters ...] {whole[-50:]}"
    assert len(printed(sample(text=whole), chars=100)) < 3000


def chosen(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> list[int]:
    """The steps of the groups that the command prints."""
    assert main(["samples", str(folder), "--width", "100", *arguments]) == 0
    return [int(step) for step in re.findall(r"^step (\d+)", capsys.readouterr().out, re.MULTILINE)]


def test_groups_are_chosen_by_step_problem_and_outcome(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = [rollout(0, "yes", reward=1.0), rollout(2, "no")]
    groups = [sample(step, rollouts=right) if step % 2 else sample(step) for step in range(1, 9)]
    write(tmp_path, *groups, sample(8, problem="Another Problem"))
    assert chosen(capsys, tmp_path) == [8]
    assert chosen(capsys, tmp_path, "--last", "3") == [7, 8, 8]
    assert chosen(capsys, tmp_path, "--last", "99") == [*range(1, 9), 8]
    assert chosen(capsys, tmp_path, "--step", "8") == [8, 8]
    assert chosen(capsys, tmp_path, "--solved", "--last", "9") == [1, 3, 5, 7]
    assert chosen(capsys, tmp_path, "--unsolved", "--last", "9") == [2, 4, 6, 8, 8], "guided rollouts do not count"
    assert chosen(capsys, tmp_path, "--problem", "another", "--last", "9") == [8]
    assert chosen(capsys, tmp_path, "--step", "3", "--problem", "PROBLEM 3", "--solved") == [3]
    assert chosen(capsys, tmp_path, "--distilled", "--last", "2") == [8, 8]
    assert chosen(capsys, tmp_path, "--distilled", "--last", "9") == [2, 4, 6, 8, 8]


def test_a_group_in_which_nothing_is_distilled_points_to_those_where_something_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = [rollout(0, "one"), rollout(2, "two")]
    hint = "No completion here is distilled; those that are: --distilled"
    for groups, told in (([sample(1), sample(2, rollouts=plain)], True), ([sample(1, rollouts=plain)], False)):
        write(tmp_path, *groups)
        assert main(["samples", str(tmp_path)]) == 0
        assert (hint in capsys.readouterr().out) == told
    write(tmp_path, sample(1))
    assert main(["samples", str(tmp_path)]) == 0
    piped = capsys.readouterr().out
    assert hint not in piped


def test_equal_completions_are_shown_once_with_their_number() -> None:
    same = [rollout(slot, "the same") for slot in (0, 1, 4, 5)]
    others = [rollout(6, "the same", versions=[4]), rollout(7, "the same", tokens=8), rollout(8, "other", reward=1.0)]
    group = sample(rollouts=[*same, *others, distilled("taught"), distilled("taught")])
    for slot, one in enumerate(group["rollouts"]):
        one["guided"] = slot >= 2
    text, page = printed(group, width=200), completions([group])
    for shown in (text, page):
        assert shown.count("the same") == 4 and shown.count("2 times") == 2 and shown.count("other") == 1
    assert text.count("taught") == 2 and page.count("tau<") + page.count("tau") >= 2, "each has its own divergences"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "4"], "none of 3 groups fits; there are groups of the steps 1 to 5, one in 2"),
        (["--problem", "nowhere"], "none of 3 groups fits"),
        (["--solved"], "none of 3 groups fits"),
        (["--last", "0"], "--last must be >= 1, got 0"),
        (["--chars", "-1"], "--chars must be >= 0, got -1"),
        (["--width", "3"], "--width must be >= 40, got 3"),
    ],
)
def test_what_cannot_be_printed_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write(tmp_path, *(sample(step) for step in (1, 3, 5)))
    assert main(["samples", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_run_without_samples_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        assert main(["samples", str(folder)]) == 2
        assert "no samples; they are written after the first step, unless learner.samples=0" in capsys.readouterr().err


def test_the_page_has_the_first_a_middle_and_the_last_group() -> None:
    page = completions([sample(step) for step in range(1, 8)])
    assert re.findall(r"<b>step (\d)</b>", page) == ["1", "4", "7"]
    assert page.count("<details") == 3 and page.count("<details open") == 1
    assert completions([]) == ""
    assert completions([sample(1)]).count("<details") == 1
    assert re.findall(r"<b>step (\d)</b>", completions([sample(1), sample(2)])) == ["1", "2"]


@pytest.mark.parametrize("text", HOSTILE)
def test_the_page_escapes_what_a_model_wrote(text: str) -> None:
    page = completions([sample(text=text, problem=text, strategy=text, answer=text)])
    assert "<script" not in page and "\x1b" not in page and "\x00" not in page and "\u202e" not in page
    page.encode()
    tags = {tag.partition(" ")[0] for tag in re.findall(r"<(/?[^>]*)>", page)}
    known = "section h2 p details summary b div table tr td q i mark code"
    assert tags <= {end + name for name in known.split() for end in ("", "/")}


def test_the_shading_of_the_page_grows_with_the_divergence() -> None:
    assert [round(strength(kl), 2) for kl in (None, 0.0, -1e-9, 0.1, 1.0, 3.0)] == [0, 0, 0, 0.1, 0.63, 0.95]
    page = completions([sample(text="abcdefgh")])
    assert re.findall(r'<mark class="k(\d+)" title="([^"]+)">(\w+)</mark>', page) == [
        ("7", "0.400 nats", "de"),
        ("18", "2.50 nats", "fgh"),
    ]


def test_an_error_names_the_steps_that_there_are() -> None:
    from sgpo_async.cli.samples import _steps

    assert _steps([sample(1)]) == "there are groups of step 1"
    assert _steps([sample(1), sample(2)]) == "there are groups of the steps 1 to 2"


@pytest.mark.parametrize("default", [False, True])
def test_a_page_has_the_chosen_groups_with_alone_and_guided_side_by_side(
    default: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, *(sample(step) for step in range(4)))
    page = tmp_path / "samples.html"
    assert main(["samples", str(tmp_path), "--last", "2", "--html", *([] if default else [str(page)])]) == 0
    assert capsys.readouterr().out == f"2 groups: {page}\n"
    html = page.read_text(encoding="utf-8")
    assert "step 2" in html and "step 3" in html and "step 1" not in html
    assert html.count('<div class="sides">') == 2 and LEFT_OUT in html


@pytest.mark.parametrize(
    ("written", "struck", "note"),
    [
        ({"left_out": [0, 2]}, ["a", "c"], "2 of 4 tokens distilled"),
        ({"left_out": [0]}, ["a"], "3 of 4 tokens distilled"),
        ({"left_out": [], "kl": [0.0, 0.4, 0.6, 0.0]}, [], "distilled"),
        ({}, ["a"], "3 of 4 tokens distilled"),  # of an older file
    ],
)
def test_tokens_that_are_not_distilled_are_struck_through(
    written: dict[str, Any], struck: list[str], note: str
) -> None:
    known = {"kl": [None, 0.4, 0.6, 0.0], "pieces": list("abcd")} | written
    group = sample(0, rollouts=[rollout(0, "none", guided=True), rollout(1, "abcd", guided=True, **known)])
    page = samples_page("run", [group], chars=0)
    assert re.findall(r'<mark class="[^"]*\bleft-out" title="[^"]*not distilled">(\w)</mark>', page) == struck
    assert page.count('left-out"') == len(struck) and f"<i>{note}</i>" in page
    assert re.findall(r"\x1b\[9(?:;\d+)*m(.)", printed(group, terminal=True)) == struck
    assert f"{note};" in printed(group)


def test_the_marks_of_tokens_remain_where_the_middle_is_left_out() -> None:
    one = rollout(0, "", guided=True, kl=[0.5] * 9, pieces=["ab"] * 9, left_out=[1, 8])
    cut = runs_of(one, chars=8)
    assert [(run.text, run.left_out) for run in cut if run.kl] == [("ab", False), ("ab", True)] * 2


@pytest.mark.parametrize(("width", "beside"), [(140, True), (120, True), (119, False), (80, False)])
def test_alone_and_guided_are_side_by_side_where_the_terminal_is_wide(width: int, beside: bool) -> None:
    text = "a long completion " * 20
    lines = printed(sample(text=text), width=width).splitlines()
    assert all(cell_len(line) <= width for line in lines)
    (alone,) = (line for line in lines if "alone: 0 of 2 correct" in line)
    assert ("with the strategy: 1 of 2 correct" in alone) == beside
    assert " ".join(lines).count("completion") >= 4 * 20, "nothing is cut off"
    only = printed(sample(rollouts=[rollout(0, text)]), width=width).splitlines()
    assert max(map(cell_len, only[4:])) > width - 20, "a single side has the whole width"


def test_the_completion_that_the_teacher_read_as_the_context_is_shown() -> None:
    taught = distilled("wrong answer") | {"slot": 1, "guided": False, "sibling": 0}
    group = sample(rollouts=[rollout(0, "<b>12</b>\nis the answer", reward=1.0), taught, rollout(2, "other")])
    note = "context of the teacher: the completion that begins"
    text = re.sub(r"\s+", " ", printed(group, width=200))
    assert text.count(note) == 1 and f"{note} '<b>12</b>\\nis the answer'" in text
    page = completions([group])
    assert page.count(note) == 1 and "&lt;b&gt;12" in page.split(note)[1] and "<b>12" not in page
    assert note not in printed(sample()) + completions([sample()])


@pytest.mark.parametrize("colours", [True, False])
def test_what_the_marks_mean_is_printed_once_where_there_are_colours(
    colours: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1") if colours else monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    write(tmp_path, sample(1), sample(2))
    main(["samples", str(tmp_path), "--last", "2", "--width", "100"])
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    text = "Tokens that are struck through are not distilled"
    assert re.sub(r"\s+", " ", shown).count(text) == colours
    write(tmp_path, sample(1, rollouts=[rollout(0, "no"), rollout(2, "no")]))
    main(["samples", str(tmp_path)])
    assert "struck through" not in capsys.readouterr().out
