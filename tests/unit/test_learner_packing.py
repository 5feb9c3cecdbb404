"""Packing: every token appears once and at the correct position."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sgpo_async.learner.packing import SHARE, Tokens, pack, pad, repeated_tokens

PIECES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), max_size=12)


def sequences(pieces: list[tuple[int, int]]) -> list[Tokens]:
    """Sequences in which every token is a different number."""
    numbers = iter(range(1, 1000))
    return [Tokens(*(np.array([next(numbers) for _ in range(n)], np.int32) for n in piece)) for piece in pieces]


@given(PIECES)
def test_a_row_contains_whole_sequences_and_no_padding(pieces: list[tuple[int, int]]) -> None:
    items = sequences(pieces)
    packed = pack(items)
    wholes = [np.concatenate((item.prompt, item.completion)).tolist() for item in items]
    assert packed.targets.tolist() == [token for item in items for token in item.completion.tolist()]
    assert packed.shared is None
    if items:
        assert packed.lengths == [len(whole) - 1 for whole in wholes]
        assert packed.input_ids.tolist() == [[token for whole in wholes for token in whole[:-1]]]
        assert packed.position_ids.tolist() == [[at for whole in wholes for at in range(len(whole) - 1)]]
    row, follower = packed.input_ids[0], {a: b for whole in wholes for a, b in itertools.pairwise(whole)}
    assert [follower[token] for token in row[packed.picks].tolist()] == packed.targets.tolist()


@given(st.integers(1, 9), st.lists(st.integers(1, 12), min_size=2, max_size=6), PIECES)
def test_a_common_prompt_is_in_the_row_once(prompt: int, completions: list[int], others: list[tuple[int, int]]) -> None:
    first, *more = sequences([*((prompt, n) for n in completions), *others])
    group = [first, *(item._replace(prompt=first.prompt) for item in more[: len(completions) - 1])]
    items = [*group[:1], *more[len(completions) - 1 :], *group[1:]]
    packed, plain = pack(items), np.concatenate([np.concatenate((i.prompt, i.completion[:-1])) for i in items])
    repeated = (len(completions) - 1) * prompt
    shared = repeated >= SHARE * len(plain)
    assert repeated_tokens(items) == (repeated if shared else 0)
    assert (packed.shared is not None) == shared
    assert packed.lengths == [item.length for item in items]
    row = packed.input_ids[0]
    assert len(row) == len(plain) - (repeated if shared else 0)
    if packed.shared:
        assert len(set(row.tolist())) == len(row), "every token is a different number"
        assert row[packed.shared.where].tolist() == plain.tolist()
        assert packed.shared.where[packed.shared.first].tolist() == list(range(len(row)))
        positions = np.concatenate([np.arange(item.length) for item in items])
        assert packed.position_ids[0][packed.shared.where].tolist() == positions.tolist()
    last = [own for item in items for own in [item.prompt[-1], *item.completion[:-1]]]
    assert row[packed.picks].tolist() == last


def test_sharing_that_saves_little_is_left() -> None:
    long = sequences([(1, 100), (1, 100)])
    assert pack([long[0], long[1]._replace(prompt=long[0].prompt)]).shared is None


def test_only_trained_tokens_are_picked() -> None:
    (item,) = sequences([(2, 4)])
    packed = pack([item._replace(trained=np.array([True, False, False, True]))])
    assert packed.picks.tolist() == [1, 4] and packed.targets.tolist() == item.completion[[0, 3]].tolist()


def test_a_micro_batch_without_sequences_is_one_token() -> None:
    packed = pack([])
    assert packed.input_ids.shape == packed.position_ids.shape == (1, 1) and packed.lengths == [1]
    assert len(packed.picks) == len(packed.targets) == 0


def test_pad_returns_values_and_mask() -> None:
    values, mask = pad([np.array([1.0, 2.0]), np.array([3.0])])
    assert values.tolist() == [[1, 2], [3, 0]]
    assert mask.tolist() == [[True, True], [True, False]]
