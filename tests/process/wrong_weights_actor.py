"""An actor whose engine does not serve the weights that it reports: `wrong_weights_actor.py FAULT --hub ADDRESS ...`.

The faults happen after the checks of the real engine, as a fault of an engine's own update would.
"""

import sys

import torch

from sgpo_async.actor import run as actor_run
from sgpo_async.cli.main import main
from sgpo_async.engines import EmbeddedEngine
from sgpo_async.engines.base import Weights
from sgpo_async.model import parameters
from sgpo_async.weights import digest
from sgpo_async.weights.short_digest import short_digest


class Faulty(EmbeddedEngine):
    """Loads the first version correctly."""

    loaded = False

    @torch.inference_mode()
    def load(self, weights: Weights) -> None:
        if not self.loaded:
            super().load(weights)
            self.loaded = True
            return
        self._withdraw()
        self.update(weights)
        self.version, self.digest = weights.version, short_digest(weights.digest)
        self._canary_due = 0.0

    def update(self, weights: Weights) -> None:
        """What the engine does to its weights."""


class IgnoresUpdates(Faulty):
    pass


class AppliesHalf(Faulty):
    def update(self, weights: Weights) -> None:
        model, tensors = self._decoder.model, weights.read()
        names = [name for name, _ in model.named_parameters()]
        parameters.replace(model, dict(model.named_parameters()) | {n: tensors[n] for n in names[::2]}, self._digest)


class WrongDigest(EmbeddedEngine):
    def load(self, weights: Weights) -> None:
        super().load(weights)
        self.digest ^= 1


FAULTS = {"ignores": IgnoresUpdates, "half": AppliesHalf, "digest": WrongDigest}

if __name__ == "__main__":
    fault = FAULTS[sys.argv[1]]
    actor_run.open_engine = lambda _run, folder, **_: fault.from_pretrained(folder, digest=digest, slots=16)
    raise SystemExit(main(["actor", *sys.argv[2:]]))
