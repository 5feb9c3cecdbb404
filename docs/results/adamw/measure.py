"""What compact moments of AdamW change in its steps: `python docs/results/adamw/measure.py`, 30 seconds.

Gradients of 65,536 parameters are independent normal numbers, whose sizes have a lognormal distribution over the
parameters of a block, of the stated spread; where they fall, they do to a tenth after half of the steps. Printed is the
mean distance of the last 20 steps from those of float32, relative to those.
"""

import torch
from torch import Tensor

from sgpo_async.learner.adamw import FORMS, Bfloat16, Form, Named

SIZE = (256, 256)
SETTINGS = [(0.95, 0.5, False), (0.95, 2.0, False), (0.999, 0.5, True), (0.999, 2.0, True)]  # beta2, spread, falling


class Nearest(Bfloat16):
    """Both moments in bfloat16, rounded to the nearest."""

    def write(self, stored: Named, m: Tensor, v: Tensor, _: torch.Generator) -> None:
        stored["exp_avg"].copy_(m)
        stored["exp_avg_sq"].copy_(v)


class Linear(Bfloat16):
    """M and sqrt(v) in equal steps up to the largest of a block of 256: 127 and 255 of them; kept as float32 here."""

    def columns(self, width: int) -> dict[str, tuple[int, torch.dtype]]:
        return {name: (width, torch.float32) for name in super().columns(width)}

    def write(self, stored: Named, m: Tensor, v: Tensor, _: torch.Generator) -> None:
        stored["exp_avg"].copy_(self.rounded(m, 127))
        stored["exp_avg_sq"].copy_(self.rounded(v.sqrt(), 255).square())

    def rounded(self, values: Tensor, steps: int) -> Tensor:
        scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-30) / steps
        return (values / scale).round() * scale


def distance(form: Form, beta2: float, spread: float, falling: bool) -> float:
    """The mean relative distance of the last 20 steps."""
    steps, beta1 = (200 if beta2 < 0.99 else 2000), 0.9
    draw, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    size = (spread * torch.randn(SIZE, generator=draw)).exp()
    stored = {name: torch.zeros(SIZE[0], n, dtype=dtype) for name, (n, dtype) in form.columns(SIZE[1]).items()}
    exact, found = [torch.zeros(SIZE), torch.zeros(SIZE)], []
    for step in range(1, steps + 1):
        gradient = (torch.randn(SIZE, generator=draw) + 0.1) * size * (0.1 if falling and step > steps // 2 else 1)
        ways = []
        for m, v in (tuple(exact), form.read(stored)):
            m.lerp_(gradient, 1 - beta1)
            v.lerp_(gradient.square(), 1 - beta2)
            ways.append((m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + 1e-8))
        form.write(stored, m.clone(), v.clone(), noise)
        found.append(float((ways[1] - ways[0]).norm() / ways[0].norm()))
    return sum(found[-20:]) / 20


def main() -> None:
    """Measure every form and print."""
    forms = {"bfloat16, to the nearest": Nearest(), "bfloat16": FORMS["bfloat16"]}
    forms |= {"int8, linear m and sqrt(v)": Linear(), "int8": FORMS["int8"]}
    for name, form in forms.items():
        for beta2, spread, falling in SETTINGS:
            where = f"beta2 {beta2}, spread {spread}, gradients {'fall' if falling else 'stay'}"
            print(f"{name:28} {where:44} {distance(form, beta2, spread, falling):10.3f}", flush=True)


if __name__ == "__main__":
    main()
