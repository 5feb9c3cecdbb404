"""Stand-in for sgl_kernel, SGLang's CUDA kernels (380 MB): imported at start, never called on a CPU without AMX."""

from _absent import stand_in

__path__: list[str] = []
stand_in(__name__)
