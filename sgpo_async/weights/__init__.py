"""Transfer of weights between processes: manifest, digest, and a double-buffered store in an anonymous shared file.

Importing this package does not import torch; only the functions that handle tensors do.
"""

from sgpo_async.weights.broadcast_plan import Broadcast, BroadcastPlan, plan_of
from sgpo_async.weights.digest import digest
from sgpo_async.weights.manifest import Bucket, Manifest, TensorEntry
from sgpo_async.weights.reader import LazyTensors, StoreReader
from sgpo_async.weights.store_file import StoreFile
from sgpo_async.weights.writer import StoreWriter

__all__ = [
    "Broadcast",
    "BroadcastPlan",
    "Bucket",
    "LazyTensors",
    "Manifest",
    "StoreFile",
    "StoreReader",
    "StoreWriter",
    "TensorEntry",
    "digest",
    "plan_of",
]
