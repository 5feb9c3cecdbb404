"""Packing: every token appears once, at the correct position, and rows respect the token budget."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sgpo_async.learner.packing import Tokens, first_fit_decreasing, pack, pad, plan

PIECES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), max_size=12)


def sequences(pieces: list[tuple[int, int]]) -> list[Tokens]:
    """Sequences in which every token is a different number."""
    numbers = iter(range(1, 1000))
    return [Tokens(*(np.array([next(numbers) for _ in range(n)], np.int32) for n in piece)) for piece in pieces]


@given(st.lists(st.integers(1, 40), max_size=40), st.integers(1, 100))
def test_plan_includes_each_sequence_once_within_the_budget(lengths: list[int], row_tokens: int) -> None:
    micro_batches = plan(lengths, row_tokens)
    assert sorted(i for rows in micro_batches for row in rows for i in row) == list(range(len(lengths)))
    for rows in micro_batches:
        assert all(rows)
        width = max(sum(lengths[i] for i in row) for row in rows)
        assert width * len(rows) <= row_tokens or rows == ((rows[0][0],),)


@given(st.lists(st.integers(1, 10), min_size=1, max_size=30))
def test_first_fit_decreasing_leaves_at_most_one_row_half_empty(lengths: list[int]) -> None:
    rows = first_fit_decreasing(lengths, range(len(lengths)), capacity=10)
    used = [sum(lengths[i] for i in row) for row in rows]
    assert max(used) <= 10
    assert sum(total <= 5 for total in used) <= 1


@given(PIECES, st.integers(1, 60))
def test_packed_rows_contain_whole_sequences(pieces: list[tuple[int, int]], row_tokens: int) -> None:
    items = sequences(pieces)
    for micro_batch in plan([item.length for item in items], row_tokens):
        packed = pack(items, micro_batch)
        order = sorted(i for row in micro_batch for i in row)
        assert packed.targets.tolist() == [t for i in order for t in items[i].completion.tolist()]
        flat, positions = packed.input_ids.flatten(), packed.position_ids.flatten()
        at = 0
        for i in order:
            whole = np.concatenate((items[i].prompt, items[i].completion)).tolist()
            picks = packed.picks[at : at + len(items[i].completion)]
            start = picks[0] - len(items[i].prompt) + 1
            assert flat[start : picks[-1] + 1].tolist() == whole[:-1]
            assert positions[start : picks[-1] + 1].tolist() == list(range(len(whole) - 1))
            at += len(picks)


@given(PIECES.filter(bool))
def test_positions_restart_at_every_sequence_and_at_the_padding(pieces: list[tuple[int, int]]) -> None:
    items = sequences(pieces)
    row = tuple(range(len(items)))
    packed = pack(items, (row, (0,)))
    assert (packed.position_ids == 0).sum() == len(items) + 1 + (len(items) > 1)


def test_a_micro_batch_without_sequences_is_one_token() -> None:
    packed = pack([], ())
    assert packed.input_ids.shape == (1, 1)
    assert len(packed.picks) == len(packed.targets) == 0


def test_pad_returns_values_and_mask() -> None:
    values, mask = pad([np.array([1.0, 2.0]), np.array([3.0])])
    assert values.tolist() == [[1, 2], [3, 0]]
    assert mask.tolist() == [[True, True], [True, False]]
