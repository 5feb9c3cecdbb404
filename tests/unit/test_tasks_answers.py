r"""Verdicts on answers that math-verify alone misreads: other notations, small numbers, several boxes, letters."""

import pytest

from sgpo_async.tasks.answers import choice, final, in_base, plain, readable
from sgpo_async.tasks.verify import is_math_correct, is_math_correct_within

VERDICTS = [
    # small numbers: math-verify rounds to six decimals
    ("\\frac{1}{2006!}", "\\boxed{\\frac{1}{2004!}}", False),
    ("\\frac{1}{2006!}", "\\boxed{\\frac{1}{2006!}}", True),
    ("0.00000002", "\\boxed{0.00000001}", False),
    ("0.00000002", "\\boxed{2 \\cdot 10^{-8}}", True),
    ("0.00000002", "\\boxed{0}", False),
    ("10^{-20}", "\\boxed{2 \\cdot 10^{-20}}", False),
    ("1/3", "\\boxed{0.333333}", True),
    ("0", "\\boxed{0.0}", True),
    # bases
    ("10110_2", "\\boxed{10110_3}", False),
    ("10110_2", "\\boxed{10110_{2}}", True),
    ("10110_2", "\\boxed{211_{3}}", False),  # the same number; a problem that asks for base 2 has another answer
    ("2A_{16}", "\\boxed{2a_{16}}", True),
    ("10110_2", "\\boxed{10110}", True),
    # mixed numbers
    ("2\\frac{1}{2}", "\\boxed{2 1/2}", True),
    ("2\\frac{1}{2}", "\\boxed{2.5}", True),
    ("2\\frac12", "\\boxed{\\frac{5}{2}}", True),
    ("-2\\frac{1}{2}", "\\boxed{-2.5}", True),
    ("2\\frac{1}{2}", "\\boxed{1}", False),
    ("2½", "\\boxed{2.5}", True),
    # signs of Unicode
    ("90", "\\boxed{90°}", True),
    ("90^\\circ", "\\boxed{90}", True),
    ("20°C", "\\boxed{20^{\\circ}C}", True),
    ("\\sqrt{3}", "\\boxed{√3}", True),
    ("\\sqrt{x+1}", "\\boxed{√(x+1)}", True),
    ("2\\sqrt{3}", "\\boxed{2√3}", True),
    ("\\sqrt{12}", "\\boxed{√1 2}", False),
    ("\\frac{1}{2}", "\\boxed{½}", True),
    ("x^2", "\\boxed{x²}", True),
    ("10^{-12}", "\\boxed{10⁻¹²}", True),
    ("x_1", "\\boxed{x₁}", True),
    ("2\\pi", "\\boxed{2π}", True),
    ("-3", "\\boxed{−3}", True),
    ("(-\\infty, 3]", "\\boxed{(−∞, 3]}", True),
    # thousands
    ("12345", "\\boxed{12\\,345}", True),
    ("1234567", "\\boxed{1{,}234{,}567}", True),
    ("12345", "\\boxed{12 345}", True),
    ("12345", "\\boxed{12,345}", True),
    ("12345", "\\boxed{12\\,34}", False),
    # full stops
    ("5.", "\\boxed{5}", True),
    ("5", "\\boxed{5.}", True),
    ("x+1.", "\\boxed{1+x}", True),
    # intervals as inequalities
    ("(0,12.5)", "\\boxed{0<x<12.5}", True),
    ("(0,12.5)", "\\boxed{0<x<12}", False),
    ("[3,\\infty)", "\\boxed{x \\geq 3}", True),
    # several boxes
    ("7", "So \\boxed{5}. That was wrong; so \\boxed{7}.", True),
    ("5", "So \\boxed{5}. That was wrong; so \\boxed{7}.", False),
    ("3, 5", "$x = \\boxed{3}$ or $x = \\boxed{5}$", True),
    ("3, 5", "\\boxed{3}, \\boxed{5}", True),
    ("3, 5", "\\boxed{5} \\text{ and } \\boxed{3}.", True),
    ("3", "\\boxed{3}, and so the sum is \\boxed{3}", True),
    ("7", "\\boxed{}", False),
    ("7", "it is \\boxed{7", False),  # cut off
    # currencies
    ("\\$36", "\\boxed{\\$36}", True),
    ("\\$36", "\\boxed{36}", True),
    ("36", "\\boxed{\\$36}", True),
    ("\\$18.90", "\\boxed{\\$18.90}", True),
    ("\\$18.90", "\\boxed{18.9}", True),
    ("\\$32,\\!348", "\\boxed{\\$32,\\!348}", True),
    ("\\$32,\\!348", "\\boxed{32348}", True),
    ("$3, $5", "\\boxed{$3, $5}", True),
    ("$3, $5", "\\boxed{5, 3}", True),
    ("$3, $5", "\\boxed{5}", False),
    ("$3, $5", "\\boxed{3}", False),
    ("$36", "\\boxed{36}", True),
    ("$3$, $5$", "\\boxed{5, 3}", True),
    ("$x$", "\\boxed{x}", True),
    # units
    ("18 dollars", "\\boxed{18}", True),
    ("18 dollars", "\\boxed{19}", False),
    ("60", "\\boxed{60 miles per hour}", True),
    ("60 \\text{ miles per hour}", "\\boxed{60}", True),
    ("1/2 cup", "\\boxed{0.5}", False),  # a word of three letters may be a product of variables
    ("2xy", "\\boxed{2 xy}", True),
    ("2", "\\boxed{2 xy}", False),
    ("2\\pi", "\\boxed{2 pi}", True),
    ("50\\%", "\\boxed{50 percent}", True),
    # multiple choice
    ("B", "The answer is B.", True),
    ("B", "The answer is (B).", True),
    ("B", "The answer is C.", False),
    ("B", "The answer is **B**.", True),
    ("C", "The answer is $C$.", True),
    ("C", "So the answer is $\\textbf{(C)}$.", True),
    ("C", "Option A is wrong. The answer is D.", False),
    ("B", "\\boxed{\\text{B}}", True),
    ("B", "\\boxed{\\textbf{(B)}\\ 12}", True),
    ("(B)", "\\boxed{B}", True),
    ("B", "\\boxed{C}", False),
    ("B", "\\boxed{A + B}", False),
    ("B", "I do not know.", False),
    # what was right before stays right
    ("1/2", "so it is \\boxed{0.5}", True),
    ("42", "The answer is 42.", True),
    ("x^2+1", "\\boxed{1 + x^2}", True),
    ("(3, 5)", "\\boxed{(3, 5)}", True),
    ("(1,2),(2,1)", "\\boxed{(2,1),(1,2)}", True),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\boxed{\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}}", True),
    ("\\sin 30^\\circ", "\\boxed{\\sin 30^\\circ}", True),
    ("9\\%", "\\boxed{0.09}", True),
    ("9\\%", "\\boxed{9}", True),
    ("\\text{no solution}", "\\boxed{\\text{no solution}}", True),
    ("42", "", False),
]


@pytest.mark.parametrize(("answer", "completion", "correct"), VERDICTS)
def test_a_verdict(answer: str, completion: str, correct: bool) -> None:
    assert is_math_correct(answer, completion) is correct


@pytest.mark.parametrize("answer", dict.fromkeys(answer for answer, _, _ in VERDICTS))
def test_every_answer_is_correct_in_a_box(answer: str) -> None:
    assert is_math_correct(answer, f"The answer is \\boxed{{{answer}}}.")
    assert is_math_correct_within(answer, f"The answer is \\boxed{{{answer}}}."), "a text without tolerances is exact"


def test_the_answer_is_in_the_last_box_and_in_those_that_belong_to_it() -> None:
    assert final("no box") is None
    assert final("\\boxed{1} \\boxed{2") is None, "the last one is not closed"
    assert final("\\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"
    assert final("\\boxed {5}") == "5"
    assert final("\\boxed{1}, \\boxed{2} or $\\boxed{3}$") == "1, 2, 3"
    assert final("\\boxed{1}. Then \\boxed{2}") == "2"
    assert final("\\boxed{2} and \\boxed{2}") == "2"
    assert final("\\boxed{ 1 + \\boxed{2} }") == "1 + \\boxed{2}"
    assert final("\\boxed{1 + \\boxed{2}") == "2", "the outer one is not closed"
    assert final("\\boxed{\\{1, 2\\}}") == "\\{1, 2\\}" and final("\\boxed{\\}}") == "\\}"
    assert final("}{\\boxed{1}}") == "1" and final("\\boxed 1") is None
    assert final("\\boxed{" * 100_000) is None, "in time that grows with the length"


def test_delimiters_around_an_answer_are_removed() -> None:
    for text in (
        "x + 1",
        "$x + 1$",
        "$$x + 1$$",
        "\\(x + 1\\)",
        "\\[ x + 1 \\]",
        "\\boxed{x + 1}",
        "$\\boxed{x + 1}$.",
    ):
        assert plain(text.rstrip(".")) == "x + 1"
    assert plain("$3$, $5$") == "$3$, $5$"
    assert plain("$") == "$" and plain("") == ""


def test_readable_changes_only_mathematical_signs() -> None:
    assert readable("Ångström, naïve, 求") == "Ångström, naïve, 求"
    assert readable("x²⁺¹ ≤ √y") == "x^{2+1} \\leq  \\sqrt{y}"


def test_numbers_in_a_base_and_letters_of_choices() -> None:
    assert in_base("10110_2") == (22, 2) and in_base("12_{3}") == (5, 3)
    assert in_base("x_1") is in_base("12_1") is in_base("19_8") is in_base("10") is None
    assert choice("(C)") == choice("\\textbf{(C) } 5") == choice("C.") == "C"
    assert choice("CD") is choice("K") is choice("c") is choice("A \\cup B") is None
