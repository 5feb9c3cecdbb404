"""The division of a step over ranks and micro-batches: nothing is lost, rows fit, and no rank waits for another."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from sgpo_async.learner import division
from sgpo_async.learner.division import Cost, Piece, divide, imbalance
from tests.reference import learner_cases as cases

PIECES = st.lists(
    st.builds(Piece, st.integers(1, 40), st.floats(0.1, 50.0), st.sampled_from([0.0, 1.0, 7.0])), max_size=40
)


@given(PIECES, st.integers(1, 5), st.integers(1, 100))
def test_every_piece_is_in_one_micro_batch_that_fits(pieces: list[Piece], ranks: int, row_tokens: int) -> None:
    rounds = divide(pieces, ranks=ranks, row_tokens=row_tokens)
    assert rounds and all(len(round_) == ranks for round_ in rounds)
    assert sorted(i for round_ in rounds for own in round_ for i in own) == list(range(len(pieces)))
    for own in (own for round_ in rounds for own in round_):
        assert own == sorted(own)
        assert sum(pieces[i].tokens for i in own) <= row_tokens or len(own) == 1
    assert len(rounds) <= max(1, len(pieces))
    assert -1e-9 <= imbalance(pieces, rounds) < 1


def test_the_search_for_the_rounds_begins_with_those_that_large_pieces_need(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []
    fill = division._fill
    monkeypatch.setattr(division, "_fill", lambda *args: tries.append(args[2]) or fill(*args))
    pieces = [Piece(4000 + i, 1.0 * i) for i in range(200, 500)]  # of rows of 8192: no two fit into one
    assert len(divide(pieces, ranks=8, row_tokens=8192)) == math.ceil(300 / 8) == tries[0][0]
    assert len(tries) == 1


def test_imbalance_is_the_share_of_time_spent_waiting() -> None:
    pieces = [Piece(1, 4.0), Piece(1, 2.0, 1.0), Piece(1, 1.0), Piece(1, 1.0)]
    assert imbalance(pieces, [[[0], [1]], [[2], [3]]]) == pytest.approx(
        1 - 9 / (2 * (4 + 1 + 1))
    )  # with a teacher pass
    assert imbalance([], [[[], []]]) == 0.0


def test_teacher_passes_are_spread_over_the_ranks() -> None:
    pieces = [Piece(10, 1.0, 1.0) if i % 2 else Piece(10, 1.0) for i in range(32)]
    rounds = divide(pieces, ranks=4, row_tokens=20)
    taught = [sum(pieces[i].teacher_work for round_ in rounds for i in round_[rank]) for rank in range(4)]
    assert sum(taught) == 16 and max(taught) - min(taught) <= 2


def lengths(rng: np.random.Generator, count: int) -> list[int]:
    """Lognormal lengths of completions with a mean of 1.4K tokens, 3 % of which are cut at 16K, after short prompts."""
    cut, sigma = 16_384, 1.93
    mu = math.log(cut) - NormalDist().inv_cdf(0.97) * sigma
    return (np.clip(rng.lognormal(mu, sigma, count), 8, cut).astype(int) + 100).tolist()


@pytest.mark.parametrize(("ranks", "bound"), [(6, 0.005), (32, 0.01)])
def test_ranks_hardly_wait_at_the_lengths_of_reasoning(ranks: int, bound: float) -> None:
    """128 problems of 8 rollouts with Qwen2.5-7B's costs: padding is 0, and waiting is below 1 %."""
    cost = Cost(body=13e9, attention=2 * 28 * 3584, head=2 * 152_064 * 3584)
    found = []
    for seed in range(5):
        own = lengths(np.random.default_rng(seed), 1024)
        assert 1200 < np.mean(own) < 2000
        pieces = [Piece(length, 3 * cost.forward(length=length, targets=length - 100)) for length in own]
        rounds = divide(pieces, ranks=ranks, row_tokens=17_408)
        assert len(rounds) <= math.ceil(sum(own) / (ranks * 17_408)) + 2
        found.append(imbalance(pieces, rounds))
    assert max(found) < bound


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=16, n_layer=2, n_head=2, n_positions=64)).eval()


@pytest.mark.parametrize("model", [cases.tiny_model(), cases.tiny_model(tied=True), gpt2()])
def test_the_cost_is_what_a_forward_pass_computes(model: PreTrainedModel) -> None:
    """Torch counts the FLOPs of full attention, twice those of causal attention."""
    length, cost = 50, Cost.of(model)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(1, length, dtype=torch.long), use_cache=False)
    full = cost.forward(length=length, targets=length) + cost.attention * length**2
    assert counter.get_total_flops() == pytest.approx(full, rel=0.02)  # torch does not count biases
