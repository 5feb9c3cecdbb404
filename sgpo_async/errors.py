"""Every error that a user can meet.

    SgpoError
    ├── ConfigError        a key, type, value or combination in a configuration
    ├── DataError          a problem file, a line in it, a missing tokenizer or model
    ├── WireError          a message that cannot be read
    │   └── ProtocolMismatch   ... because the other side speaks another version
    ├── HubError           the front door: port taken, unreachable, member refused
    ├── SessionError       a Torch RPC session: which node, which phase
    ├── WeightsError       a manifest, bucket or checksum that does not fit
    │   └── Superseded         the version asked for has been overwritten by a newer one
    ├── EngineError        an inference engine that cannot serve
    ├── CheckpointError    a checkpoint that cannot be written or read
    └── DeadlineExceeded   a wait that ran out: who waited for what, in which phase

A message is one line: what, where, value, remedy. Programming faults are asserts, not these.
"""


class SgpoError(Exception):
    """Root of all errors that are shown to a user as one line, without a traceback."""


class ConfigError(SgpoError):
    """A configuration that breaks a rule; names the key path, the rule and the value."""


class DataError(SgpoError):
    """Problems, tokenizers or models that cannot be read or do not fit together."""


class WireError(SgpoError):
    """A message that is malformed, truncated or too large. Costs one counted rejection."""


class ProtocolMismatch(WireError):
    """A message of another protocol version."""


class HubError(SgpoError):
    """The hub cannot bind, cannot be reached, or refuses a member."""


class SessionError(SgpoError):
    """A Torch RPC session failed; names the node and the phase."""


class WeightsError(SgpoError):
    """Weights whose names, shapes or checksums differ from what was promised."""


class Superseded(WeightsError):
    """The buffer that held this version has been reused for a newer one: ask for the manifest again."""


class EngineError(SgpoError):
    """An inference engine that cannot be started or cannot serve."""


class CheckpointError(SgpoError):
    """A checkpoint that cannot be written or read."""


class DeadlineExceeded(SgpoError):
    """A wait that ran out of time."""

    def __init__(self, who: str, what: str, seconds: float) -> None:
        super().__init__(f"{who}: no {what} within {seconds:g} s")
        self.who, self.what, self.seconds = who, what, seconds
