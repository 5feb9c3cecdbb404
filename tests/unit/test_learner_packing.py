"""Packing: every token appears once, at the correct position, and micro-batches respect the token budget."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sgpo_async.learner.packing import Tokens, pack, pad, plan

PIECES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), max_size=12)


def sequences(pieces: list[tuple[int, int]]) -> list[Tokens]:
    """Sequences in which every token is a different number."""
    numbers = iter(range(1, 1000))
    return [Tokens(*(np.array([next(numbers) for _ in range(n)], np.int32) for n in piece)) for piece in pieces]


@given(st.lists(st.integers(1, 40), max_size=40), st.integers(1, 100))
def test_plan_includes_each_sequence_once_within_the_budget(lengths: list[int], row_tokens: int) -> None:
    micro_batches = plan(lengths, row_tokens)
    assert sorted(i for own in micro_batches for i in own) == list(range(len(lengths)))
    for own in micro_batches:
        assert own and list(own) == sorted(own)
        assert sum(lengths[i] for i in own) <= row_tokens or len(own) == 1


@given(st.lists(st.integers(1, 10), min_size=1, max_size=30))
def test_plan_leaves_at_most_one_micro_batch_half_empty(lengths: list[int]) -> None:
    used = [sum(lengths[i] for i in own) for own in plan(lengths, row_tokens=10)]
    assert sum(total <= 5 for total in used) <= 1


@given(PIECES)
def test_a_row_contains_whole_sequences_and_no_padding(pieces: list[tuple[int, int]]) -> None:
    items = sequences(pieces)
    packed = pack(items)
    wholes = [np.concatenate((item.prompt, item.completion)).tolist() for item in items]
    assert packed.targets.tolist() == [token for item in items for token in item.completion.tolist()]
    if items:
        assert packed.lengths == [len(whole) - 1 for whole in wholes]
        assert packed.input_ids.tolist() == [[token for whole in wholes for token in whole[:-1]]]
        assert packed.position_ids.tolist() == [[at for whole in wholes for at in range(len(whole) - 1)]]
    row, follower = packed.input_ids[0], {a: b for whole in wholes for a, b in itertools.pairwise(whole)}
    assert [follower[token] for token in row[packed.picks].tolist()] == packed.targets.tolist()


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
