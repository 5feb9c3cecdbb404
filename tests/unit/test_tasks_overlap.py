"""Words, n-grams, near-duplicates and containment, compared with naive implementations of their definitions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpo_async.tasks.overlap import Contained, Nearest, grams_of, normalised, words_of

TEXTS = st.lists(st.sampled_from("abcd"), max_size=9).map(tuple)  # with few distinct words, so that texts often overlap


def test_words_drop_notation_and_keep_letters_of_every_script() -> None:
    assert words_of(r"Find $x^2$, if  Ångström_1!") == ("find", "x", "^2", "if", "ångström", "1")
    assert words_of(r"\(x^{2}\)") == words_of("$x^2$")
    assert words_of("求 x 的值") == ("求", "x", "的", "值")
    assert words_of("+ - $") == ()


def test_normalised_texts_differ_in_operators_but_not_in_case_spaces_or_unicode_form() -> None:
    assert normalised(" What\n is  3 + 5? ") == normalised("what is 3 + 5?")
    assert normalised("3 + 5") != normalised("3 - 5")
    assert normalised("e\u0301") == normalised("\u00e9")


def test_a_text_shorter_than_n_is_one_ngram() -> None:
    assert grams_of(("a", "b", "c"), 2) == {("a", "b"), ("b", "c")}
    assert grams_of(("a",), 2) == {("a",)}
    assert grams_of((), 2) == set()


def jaccard(one: tuple[str, ...], other: tuple[str, ...], size: int) -> float:
    """The number of shared n-grams divided by the number of all."""

    def ngrams(words: tuple[str, ...]) -> set[tuple[str, ...]]:
        return {words[i : i + size] for i in range(max(1, len(words) - size + 1))} if words else set()

    a, b = ngrams(one), ngrams(other)
    return len(a & b) / len(a | b) if a | b else 0.0


@given(st.lists(TEXTS, max_size=8), st.integers(1, 3), st.sampled_from([0.1, 0.25, 0.5, 2 / 3, 0.8, 0.9, 1.0]))
def test_nearest_finds_exactly_the_texts_that_reach_the_threshold(texts: list, size: int, least: float) -> None:
    nearest = Nearest(texts, size=size, least=least)
    for index, words in enumerate(texts):
        found = {match.index: match.overlap for match in nearest.matches(index)}
        overlaps = {other: jaccard(words, texts[other], size) for other in range(index)}
        assert found == {other: overlap for other, overlap in overlaps.items() if overlap >= least}
        nearest.keep(index)


def containment(one: tuple[str, ...], other: tuple[str, ...], size: int) -> float:
    """The share of n-grams of the shorter text; if it has fewer than n words, 1 if the other contains it, else 0."""
    short, long = sorted((one, other), key=len)
    if not short:
        return 0.0
    if len(short) < size:
        return float(any(long[i : i + len(short)] == short for i in range(len(long) - len(short) + 1)))
    a, b = ({words[i : i + size] for i in range(len(words) - size + 1)} for words in (one, other))
    return len(a & b) / min(len(a), len(b))


@given(st.lists(TEXTS, max_size=6), TEXTS, st.integers(1, 4))
def test_contained_finds_the_text_with_the_largest_overlap(texts: list, words: tuple, size: int) -> None:
    match = Contained(texts, size=size).best(words)
    overlaps = [containment(words, text, size) for text in texts]
    assert (match.overlap if match else 0.0) == max(overlaps, default=0.0)
    if match:
        assert overlaps[match.index] == match.overlap
        shared = tuple(match.shared.split())
        assert all(containment(shared, text, len(shared)) == 1.0 for text in (words, texts[match.index]))


@pytest.mark.parametrize(
    ("text", "overlap"),
    [
        ("one two three four five six", 1.0),
        ("so: one two three four five six seven", 1.0),
        ("zero one two three four", 2 / 3),
        ("three four", 1.0),
        ("four three", None),
        ("seven eight nine ten", None),
    ],
)
def test_contained_equals_values_computed_by_hand(text: str, overlap: float | None) -> None:
    match = Contained([words_of("nothing in common"), words_of("One, two three: four five six!")], size=3).best(
        words_of(text)
    )
    assert (match and (match.index, match.overlap)) == (overlap and (1, overlap))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1 * 7", "1 - 7", False),
        ("What is 1 * 7?", "What is $1 \\times 7$?", True),
        ("What is 1 * 7?", "What is 1·7?", True),
        ("Is 3 < x?", "Is $3 \\le x$?", False),
        ("Is 3 ≤ x?", "Is $3 \\leq x$?", True),
        ("1 + \\sin x", "1 - \\sin x", False),
        ("$x^2$", "\\(x^{2}\\)", True),
        ("x^2", "x 2", False),
        ("a well-known rule", "a well known rule", True),
        ("**Find** the sum", "Find the sum", True),
        ("- Find the sum", "Find the sum", True),
        ("-5 degrees", "5 degrees", False),
    ],
)
def test_operators_matter_and_their_notation_does_not(one: str, other: str, same: bool) -> None:
    assert (words_of(one) == words_of(other)) is same
    assert (Contained([words_of(one)], size=13).best(words_of(other)) is not None) is same
