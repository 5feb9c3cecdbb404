"""Words, n-grams, near-duplicates and containment, against definitions written out naively."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgpo_async.tasks.overlap import Contained, Nearest, grams_of, normalised, words_of

FEW = st.lists(st.sampled_from("abcd"), max_size=9).map(tuple)  # so few words that texts often agree


def test_words_leave_out_notation_but_no_script() -> None:
    assert words_of(r"Find $x^2$, if  Ångström_1!") == ("find", "x", "2", "if", "ångström", "1")
    assert words_of(r"\(x^{2}\)") == words_of("$x^2$")
    assert words_of("求 x 的值") == ("求", "x", "的", "值")
    assert words_of("+ - $") == ()


def test_a_normalised_text_keeps_its_signs() -> None:
    assert normalised(" What\n is  3 + 5? ") == normalised("what is 3 + 5?")
    assert normalised("3 + 5") != normalised("3 - 5")
    assert normalised("e\u0301") == normalised("\u00e9")


def test_grams() -> None:
    assert grams_of(("a", "b", "c"), 2) == {("a", "b"), ("b", "c")}
    assert grams_of(("a",), 2) == {("a",)}
    assert grams_of((), 2) == set()


def jaccard(one: tuple[str, ...], other: tuple[str, ...], size: int) -> float:
    def runs(words: tuple[str, ...]) -> set[tuple[str, ...]]:
        return {words[i : i + size] for i in range(max(1, len(words) - size + 1))} if words else set()

    a, b = runs(one), runs(other)
    return len(a & b) / len(a | b) if a | b else 0.0


@given(st.lists(FEW, max_size=8), st.integers(1, 3), st.sampled_from([0.1, 0.25, 0.5, 2 / 3, 0.8, 0.9, 1.0]))
def test_nearest_finds_all_and_only_what_reaches_the_share(texts: list, size: int, least: float) -> None:
    nearest = Nearest(texts, size=size, least=least)
    for index, words in enumerate(texts):
        found = {match.index: match.overlap for match in nearest.matches(index)}
        overlaps = {other: jaccard(words, texts[other], size) for other in range(index)}
        assert found == {other: overlap for other, overlap in overlaps.items() if overlap >= least}
        nearest.keep(index)


def agreement(one: tuple[str, ...], other: tuple[str, ...], size: int) -> float:
    """The share of n-grams, or whether the shorter text stands within the other."""
    short, long = sorted((one, other), key=len)
    if not short:
        return 0.0
    if len(short) < size:
        return float(any(long[i : i + len(short)] == short for i in range(len(long) - len(short) + 1)))
    a, b = ({words[i : i + size] for i in range(len(words) - size + 1)} for words in (one, other))
    return len(a & b) / min(len(a), len(b))


@given(st.lists(FEW, max_size=6), FEW, st.integers(1, 4))
def test_contained_finds_the_text_that_agrees_most(texts: list, words: tuple, size: int) -> None:
    match = Contained(texts, size=size).best(words)
    overlaps = [agreement(words, text, size) for text in texts]
    assert (match.overlap if match else 0.0) == max(overlaps, default=0.0)
    if match:
        assert overlaps[match.index] == match.overlap
        run = tuple(match.shared.split())
        assert all(agreement(run, text, len(run)) == 1.0 for text in (words, texts[match.index]))


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
def test_contained_by_hand(text: str, overlap: float | None) -> None:
    match = Contained([words_of("nothing of it"), words_of("One, two three: four five six!")], size=3).best(
        words_of(text)
    )
    assert (match and (match.index, match.overlap)) == (overlap and (1, overlap))
