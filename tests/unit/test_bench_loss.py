"""The losses that are measured, and mistakes of the user."""

import pytest

from sgpo_async.bench.loss import main
from sgpo_async.bench.worker_loss import LOSSES, inputs


@pytest.mark.parametrize("loss", LOSSES)
def test_both_ways_compute_the_same_loss_and_gradients(loss: str) -> None:
    given, found = inputs(20, 50, 8), {}
    for way, function in LOSSES[loss].items():
        given.hidden.grad = given.weight.grad = None
        value = function(given)
        value.backward()
        assert given.hidden.grad is not None
        assert given.weight.grad is not None
        found[way] = (value.detach(), given.hidden.grad, given.weight.grad)
    for fused, naive in zip(found["fused"], found["naive"], strict=True):
        assert fused.numpy() == pytest.approx(naive.numpy(), abs=1e-6)


def test_a_wrong_size_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tokens", "0"]) == 2
    assert capsys.readouterr().err == "error: --tokens must be > 0, got 0\n"
