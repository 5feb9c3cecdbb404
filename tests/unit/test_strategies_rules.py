"""Pure functions that parse replies, find leaks, remove duplicates and choose the best candidate."""

from __future__ import annotations

import json
from fractions import Fraction

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sgpo_async.strategies.candidates import alike, best_of, filter_replies
from sgpo_async.strategies.leaks import leaks
from sgpo_async.strategies.parse import Unreadable, parse_scores, parse_strategy
from sgpo_async.strategies.values import Root, numbers
from sgpo_async.tasks.base import Problem

GOOD = {"type": "Linear equations", "strategy": "Isolate the unknown.", "steps": ["Collect terms.", "Divide."]}
SCORE = {"type": 3, "approach": 4, "abstraction": 5, "clean": 5}


def test_the_text_of_a_parsed_strategy_has_type_strategy_and_numbered_steps() -> None:
    text = parse_strategy(json.dumps(GOOD)).text()
    assert text == (
        "Problem type: Linear equations\nStrategy: Isolate the unknown.\nSteps:\n1. Collect terms.\n2. Divide."
    )
    assert parse_strategy(f"```json\n{json.dumps(GOOD)}\n```").text() == text
    numbered = GOOD | {"steps": ["1. Collect terms.", "Step 2: Divide."]}
    assert parse_strategy(json.dumps(numbered)).text() == text


@pytest.mark.parametrize(
    ("step", "read"),
    [
        ("3.5 times the base area is the volume", "3.5 times the base area is the volume"),
        ("12:30 is when they meet", "12:30 is when they meet"),
        ("2) Divide.", "Divide."),
        ("(2) Divide.", "Divide."),
        ("3. 5 is subtracted", "5 is subtracted"),
    ],
)
def test_only_the_numbering_of_a_step_is_dropped(step: str, read: str) -> None:
    assert parse_strategy(json.dumps(GOOD | {"steps": [step, "Last."]})).steps == (read, "Last.")


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "the reply must be one JSON object"),
        ("Sure! Collect terms, then divide.", "the reply must be one JSON object, got none"),
        (json.dumps(GOOD) + json.dumps(GOOD), "the reply must be one JSON object, got 2"),
        (f"<think>A draft: {json.dumps(GOOD)}", "the reply must be one JSON object, got none"),
        ("[" * 100_000, "the reply must be one JSON object"),
        ('{"type":' * 100_000, "the reply must be one JSON object"),
        ("[1, 2]", "the reply must be one JSON object"),
        (json.dumps({"type": "a", "steps": ["a", "b"]}), "the keys must be steps, strategy, type"),
        (json.dumps(GOOD | {"answer": "7"}), "the keys must be"),
        (json.dumps(GOOD | {"steps": ["only one"]}), "steps must be a list of 2 to 8 texts"),
        (json.dumps(GOOD | {"steps": "a, b"}), "steps must be a list of 2 to 8 texts"),
        (json.dumps(GOOD | {"steps": ["a", 3]}), "a step must be text"),
        (json.dumps(GOOD | {"type": "  "}), "type must be text"),
        (json.dumps(GOOD | {"strategy": "x" * 601}), "strategy must have at most 600 characters"),
        ('{"type": "\\ud800", "strategy": "b", "steps": ["a", "b"]}', "type must be valid Unicode"),
    ],
)
def test_an_invalid_strategy_is_rejected_with_the_reason(reply: str, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        parse_strategy(reply)


DRAFT = {"type": "A draft", "strategy": "Guess.", "steps": ["Guess.", "Check."]}


@pytest.mark.parametrize(
    "reply",
    [
        "Sure! {}",
        "{} I hope that helps.",
        "```JSON\n{}\n```",
        "```\n{}\n```",
        "Here it is, for the set {{1, 2}} and f(x) = {{x : x \\in A}}:\n```json\n{}\n```\nAsk me for more.",
        '{{"note": "an object of another form"}}\n{}',
        "<think>\nLet me see.\n</think>\n\n{}",
        f"<think>First: {json.dumps(DRAFT).replace('{', '{{').replace('}', '}}')}</think>{{}}",
        f"First: {json.dumps(DRAFT).replace('{', '{{').replace('}', '}}')}</think>{{}}",  # the tag begins in the prompt
        "<THINKING>Hm.</THINKING> {}",
    ],
)
def test_the_one_json_object_is_found_in_thoughts_prose_and_fences(reply: str) -> None:
    assert parse_strategy(reply.format(json.dumps(GOOD))) == parse_strategy(json.dumps(GOOD))
    assert parse_strategy(reply.format(json.dumps(GOOD, indent=1))) == parse_strategy(json.dumps(GOOD))
    if "draft" not in reply:
        assert parse_scores(reply.format(json.dumps({"scores": [SCORE]})), 1) == [SCORE]


@pytest.mark.parametrize(
    "text",
    [
        *(
            r"\frac{1}{2}",
            r"\dfrac12",
            r"\tfrac{1}{2}",
            r"a \times b",
            r"\text{if}",
            r"\theta + \tau",
            r"\tan x",
            r"\to 0",
        ),
        *(
            r"\beta",
            r"\bar{x}",
            r"\boxed{x}",
            r"\binom{n}{k}",
            r"\begin{cases}",
            r"\rho",
            r"\right)",
            r"\rangle",
            r"\forall x",
        ),
        *(r"\nabla f", r"a \neq b", r"x \notin A", r"\nu_i", r"a \not= b", r"\underline{x}", r"\uparrow"),
        *(r"\sqrt{x}", r"\alpha", r"\(x\)", r"\[x\]", r"\{x\}", r"50\%", r"\$x\$", r"\Rightarrow", r"x\,y"),
    ],
)
def test_a_latex_command_survives_with_one_backslash_or_two(text: str) -> None:
    for backslashes in ("\\", "\\\\"):
        wire = text.replace("\\", backslashes)
        reply = f'{{"type": "{wire}", "strategy": "Use {wire}.", "steps": ["{wire}, then", "Divide."]}}'
        assert parse_strategy(reply).type == text
        assert parse_strategy(reply).steps == (f"{text}, then", "Divide.")


@pytest.mark.parametrize(
    ("wire", "text"),
    [
        (r"First.\nThen.", "First. Then."),
        (r"First.\nnext, \nunder it", "First. next, under it"),
        (r"a\tb \tthen c\r\nd", "a b then c d"),
        (r"say \"x\" or a\/b", 'say "x" or a/b'),
        (r"caf\u00e9 \u03b2eta", "café βeta"),
        (r"two \\\\ lines", r"two \\ lines"),
        ("a line\nbreak", "a line break"),
    ],
)
def test_escapes_of_json_still_work(wire: str, text: str) -> None:
    assert parse_strategy(f'{{"type": "{wire}", "strategy": "b", "steps": ["a", "b"]}}').type == text


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ([SCORE], "scores must be a list of 2 objects"),
        ([SCORE, {"type": 1}], "each score must have the keys type, approach, abstraction, clean"),
        ([SCORE, SCORE | {"clean": 6}], "clean must be a whole number from 1 to 5"),
        ([SCORE, SCORE | {"clean": 4.5}], "clean must be a whole number from 1 to 5"),
        ([SCORE, SCORE | {"clean": True}], "clean must be a whole number from 1 to 5"),
        ("5, 5", "scores must be a list of 2 objects"),
    ],
)
def test_invalid_scores_are_rejected_with_the_reason(scores: object, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        parse_scores(json.dumps({"scores": scores}), 2)
    assert parse_scores(json.dumps({"scores": [SCORE, SCORE]}), 2) == [SCORE, SCORE]


@pytest.mark.parametrize("command", [r"\frac{3}{7}", r"\dfrac37", r"\tfrac{3}{7}", r"\boxed{\frac{3}{7}}"])
@pytest.mark.parametrize("backslash", ["\\", "\\\\"])
def test_a_fraction_leaks_however_its_backslash_was_written(command: str, backslash: str) -> None:
    wire = command.replace("\\", backslash)
    reply = f'{{"type": "Ratio", "strategy": "The share is ${wire}$.", "steps": ["Add.", "Divide."]}}'
    problem = Problem(id="p", problem="What is the share?", answer="3/7", response="It is 3 of 7.")
    assert [one["reason"] for one in filter_replies([reply], problem).rejected] == ["leak"]


@pytest.mark.parametrize("mangled", ["\frac{3}{7}", " rac{3}{7}", "\tfrac{3}{7}", " frac{3}{7}", "\boxed{3/7}"])
def test_a_fraction_in_a_library_leaks_although_its_command_was_read_as_an_escape(mangled: str) -> None:
    found = leaks(f"The share is {mangled}.", problem="What is the share?", answer="3/7", response="It is 3 of 7.")
    assert "the answer's number 3/7" in found


@given(st.text(max_size=60) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_an_arbitrary_reply_raises_only_unreadable(reply: str) -> None:
    for read in (parse_strategy, lambda text: parse_scores(text, 3)):
        with pytest.raises(Unreadable):
            read(reply)


def test_the_best_has_the_highest_sum_then_the_highest_minimum_then_the_lowest_index() -> None:
    low, high = dict.fromkeys(SCORE, 2), dict.fromkeys(SCORE, 5)
    assert best_of([low, high, high]) == 1
    uneven, even = {"type": 5, "approach": 1, "abstraction": 3, "clean": 3}, dict.fromkeys(SCORE, 3)
    assert best_of([uneven, even]) == 1


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,200 people, 1\\,200, 1{,}200", {1200}),
        ("3.50 and .5", {Fraction(7, 2), Fraction(1, 2)}),
        ("\\frac{3}{4} or \\dfrac34", {Fraction(3, 4)}),
        ("2/3 of it", {Fraction(2, 3)}),
        ("25% or 25\\%", {25, Fraction(1, 4)}),
        ("twelve, twenty-five and thirty", {12, 25, 30}),
        ("a half, three quarters", {Fraction(1, 2), 3, Fraction(1, 4)}),
        ("a dozen; one hundred", {12, 100}),
        ("1. First\n2) then\n(3) last\nStep 4: done", set()),
        ("the 2nd and 3rd, the one", set()),
        ("x1, x_2 and a_{12}", set()),
        ("in 2024.", {2024}),
        ("x^2 + 5x", {2, 5}),
        ("-7", {-7}),
        ("x = -5, y=−5, f(-5), $-5$, is -5, is negative five", {-5}),
        ("x = - 5", {-5}),
        ("±5", {5, -5}),
        ("2-5, x-5, x - 5, (a)-5, a degree-5 polynomial, 2--5", {2, 5}),
        ("- 5 apples\n- step 5", {5}),
        ("-\\frac{1}{2}, \\frac{-1}{2}", {Fraction(-1, 2)}),
        ("3/4. Then 1/2, 3/4.5", {Fraction(3, 4), Fraction(1, 2), 3, Fraction(9, 2)}),
        ("\\sqrt{49}, \\frac{\\sqrt{16}}{2}", {7, 2}),
        ("no number", set()),
        (f"{'9' * 5000}, 5 and 1/{'7' * 5000}", {5, 1}),
    ],
)
def test_numbers_are_found_by_value(text: str, values: set[Fraction | int]) -> None:
    assert numbers(text) == {Fraction(value) for value in values}


@pytest.mark.parametrize(
    ("text", "square"),
    [
        *[(form, 3) for form in ("\\sqrt{3}", "\\sqrt3", "√3", "sqrt(3)", "the square root of 3", "3/\\sqrt{3}")],
        *[(form, 75) for form in ("5\\sqrt{3}", "5√3", "5 \\cdot \\sqrt 3", "5 times the square root of 3", "√75")],
        *[(form, Fraction(3, 4)) for form in ("\\frac{\\sqrt{3}}{2}", "\\frac12\\sqrt{3}", "\\sqrt{\\frac{3}{4}}")],
    ],
)
def test_an_irrational_root_is_a_value_and_its_radicand_is_not(text: str, square: int | Fraction) -> None:
    assert Root(Fraction(square)) in numbers(text)
    assert Root(Fraction(square), negative=True) in numbers(f"x = -{text.removeprefix('the ')}")
    assert 3 not in numbers(text) or text.startswith("3")


@given(st.integers(min_value=4, max_value=10**7), st.sampled_from(["{}", "{:,}", "{}.0", "\\boxed{{{}}}", "${}$"]))
def test_an_answer_leaks_in_every_form(value: int, form: str) -> None:
    strategy = f"Show that the sum is {form.format(value)} by symmetry."
    assert leaks(strategy, problem="Find the sum.", answer=str(value), response="...")
    assert leaks("Use symmetry.", problem="Find the sum.", answer=form.format(value), response="...") == []


PROBLEM = "A train covers 120 km in 2 hours. How far does it go in 5 hours?"
RESPONSE = "Its speed is 120/2 = 60 km/h. In 5 hours it goes 60 * 5 = 300 km. So the answer is \\boxed{300}."


@pytest.mark.parametrize(
    ("strategy", "leak"),
    [
        ("Find the speed first; it is 60 km/h.", "the response's number 60"),
        ("The distance is three hundred, no: 300 km.", "the answer's number 300"),
        ("Sixty kilometres an hour, times the time.", "the response's number 60"),
        ("Divide 120 by 2, then multiply by 5.", ""),
        ("Find the unit rate, then scale it.\n1. Divide.\n2. Multiply.", ""),
        ("Consider two cases, the 2nd is trivial.", ""),
    ],
)
def test_numbers_of_the_response_and_the_answer_leak(strategy: str, leak: str) -> None:
    found = leaks(strategy, problem=PROBLEM, answer="300", response=RESPONSE)
    assert (leak in found) if leak else found == []


@pytest.mark.parametrize(
    ("answer", "strategy", "leaky"),
    [
        ("\\frac{1}{2}", "The probability is 0.5 by symmetry.", True),
        ("\\frac{1}{2}", "The probability is one half.", True),
        ("0.25", "Take 25 % of it.", True),
        ("25\\%", "A quarter of it.", True),
        ("\\frac{1}{2}", "Count favourable and possible cases.", False),
        ("(3, 5)", "The point has first coordinate 5.", True),
        ("x+1", "It factors as x + 1 times something.", True),
        ("x+1", "Factor the polynomial.", False),
        ("\\sqrt{3}", "The height is \\sqrt{3}.", True),
        ("3\\sqrt{2}", "The diagonal is 3√2.", True),
        ("\\sqrt{3}", "There are 3 of them.", False),
        ("\\frac{1}{2}", "Split into two cases.", False),
        ("\\frac{3}{4}", "Compare the 3 sides with each other.", False),
        ("C", "The correct option is C.", True),
        ("C", "Consider the circle C.", False),
        ("Paris", "Recall that Paris is the capital.", True),
        ("Paris", "Recall the capital.", False),
        ("even", "Show that seven divides it.", False),
        ("4", "Four of them remain.", True),
        ("1", "Only one of them remains.", False),  # "one" does not count as a number: it is too common
    ],
)
def test_an_answer_of_any_kind_leaks_in_equivalent_forms(answer: str, strategy: str, leaky: bool) -> None:
    found = leaks(strategy, problem="Find it.", answer=answer, response=f"So it is {answer}.")
    assert bool(found) == leaky, found


@pytest.mark.parametrize(
    ("problem", "answer", "strategy", "leaky"),
    [
        ("Solve x + 5 = 0.", "-5", "Then x = -5.", True),
        ("Solve x + 5 = 0.", "- 5", "Then x = −5.", True),
        ("Solve x + 5 = 0.", "-5", "It is negative five.", True),
        ("Solve x + 5 = 0.", "-5", "Subtract 5 from both sides.", False),
        ("Solve x - 5 = 0.", "5", "Add 5 to both sides.", False),
        ("Solve |x| + x = -10.", "-5", "Use 5 for the absolute value.", True),  # 5 is not in the problem
        ("Solve x + 5 = 0.", "-5", "Count from 2-5.\n- 5 is on the left", False),
        ("A prism has sides 3 and 5.", "5\\sqrt{3}", "The height is 5\\sqrt{3}.", True),
        ("A prism has sides 3 and 5.", "5\\sqrt{3}", "The height is \\sqrt{75}.", True),
        ("A prism has sides 3 and 5.", "5\\sqrt{3}", "Halve the side 5, then use Pythagoras with 3.", False),
        ("A triangle with sides 3.", "\\sqrt{3}", "It comes to √3.", True),
        ("A triangle with sides 3.", "\\sqrt{3}", "Halve the side of 3.", False),
        ("A side is 5\\sqrt{3}, another 3.", "5\\sqrt{3}", "Start from the side 5\\sqrt{3}.", False),
        ("Draw 3 of 4 balls.", "0.75", "In the end the chance is 3/4.", True),
        ("Draw 3 of 4 balls.", "0.75", "Compare 3 with 4.", False),
        ("A box holds 12.", "12", "So the answer is 12.", True),
        ("A box holds 12.", "12", "The final answer: **12.0**", True),
        ("A box holds 12.", "12", "The result must be twelve.", True),
        ("A box holds 12.", "12", "Write \\boxed{12}.", True),
        ("A box holds 12.", "12", "This leaves 12 as the final result.", True),
        ("A box holds 12.", "12", "Start from the 12 in the box; the answer is what is left.", False),
        ("A box holds 12.", "12", "Write down the result.\n12. Go on", False),
        ("Solve x + 5 = 0 or x = -5.", "-5", "The solution is x, and the answer is -5.", True),
        ("Is it (3, 5) or (5, 3)?", "(3, 5)", "The answer is (3, 5).", True),
        ("Take 3 and 5.", "(3, 5)", "The point is (3, 5).", True),
        ("Take 3 and 5.", "(3, 5)", "Take 3 first, then 5.", False),
        ("Is it Paris or Rome?", "Paris", "The answer is Paris.", True),
        ("Is it Paris or Rome?", "Paris", "Compare Paris with Rome.", False),
        ("Is it Paris or Rome?", "Paris", "We find Paris as the answer.", True),
        ("Which one?", "C", "Answer: (C)", True),
        ("Which one?", "C", "This leaves (C) as the answer.", True),
        ("Which one?", "A", "The answer is a number.", False),
    ],
)
def test_leaks_are_found_although_the_problem_contains_the_digits_of_the_answer(
    problem: str, answer: str, strategy: str, leaky: bool
) -> None:
    found = leaks(strategy, problem=problem, answer=answer, response=f"So it is {answer}.")
    assert bool(found) == leaky, found


def test_a_number_of_the_problem_is_not_a_leak() -> None:
    found = leaks("Start from 36 and halve it.", problem="Halve 36 until 9 is left.", answer="9", response="36, 18, 9")
    assert found == []
    assert leaks("Pass 18 on the way.", problem="Halve 36 until 9 is left.", answer="9", response="36, 18, 9")


def test_replies_are_filtered_in_order() -> None:
    problem = Problem(id="p", problem=PROBLEM, answer="300", response=RESPONSE)
    good = json.dumps({"type": "Rates", "strategy": "Find the unit rate, then scale.", "steps": ["Divide.", "Scale."]})
    leaky = json.dumps({"type": "Rates", "strategy": "The speed is 60.", "steps": ["Divide.", "Scale."]})
    other = json.dumps({"type": "Proportion", "strategy": "Set two ratios equal.", "steps": ["Write both.", "Solve."]})
    filtered = filter_replies([leaky, good, "nonsense", good, other], problem)
    assert len(filtered.kept) == 2
    assert filtered.kept[0].startswith("Problem type: Rates")
    assert [rejection["reason"] for rejection in filtered.rejected] == ["leak", "unreadable", "duplicate"]
    assert "the response's number 60" in filtered.rejected[0]["detail"]
    assert alike("one two three four five six", "One two, three four five six!")
    assert not alike("find the rate and scale it", "set two ratios equal and solve")
