"""Stand-in for torchvision (a CUDA build that fails with a CPU torch): imported at start, never called for text."""

from _absent import stand_in

__path__: list[str] = []
__version__ = "0.0.0"
stand_in(__name__)
