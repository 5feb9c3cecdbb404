"""Every error that a user can see.

    SgpoError
    ├── ConfigError             a key, type, value or combination in a configuration breaks a rule
    ├── DataError               a problem file, a line in it, a tokenizer or a model cannot be used
    ├── WireError               a message cannot be read
    │   └── ProtocolMismatch        ... because the sender uses another protocol version
    ├── HubError                the hub's port is taken, the hub cannot be reached
    │   ├── HubAbsent               no hub answers this process, or none takes it as a member
    │   └── Refusal                 the hub refuses an actor
    ├── SessionError            a Torch RPC session failed: which node, which phase
    ├── WeightsError            a manifest, bucket or checksum is not the expected one
    │   └── Superseded              a newer weight version has overwritten the requested one
    ├── EngineError             an inference engine cannot start or cannot serve
    │   └── CheckFailed             a check of `sgpo-async doctor`, or of a server that joins, failed: the remedy
    │       └── CheckWarning           ... as a warning: it works, but the user should know
    ├── EndpointError           a server of chat completions cannot serve any request
    ├── CheckpointError         a checkpoint cannot be written or read
    ├── RunFailed               the hub, the learner or all actors of a local run ended unexpectedly
    ├── Interrupted             a signal has ended the process in good order: how to go on
    └── DeadlineExceeded        a wait timed out: in which process, and for which event

Some modules subclass these to handle one case apart, e.g. ServerGone(EngineError) of the SGLang client.

A message is one line: what, where, value, remedy. Mistakes in this package's own code raise AssertionError instead.
"""

from typing import ClassVar


class SgpoError(Exception):
    """Root of all errors that a command shows as one line, without a traceback.

    `may_pass`: another process with the same command may succeed, because the error comes from other processes, or
    from this one alone. All other errors are permanent: retrying cannot help.
    """

    may_pass: ClassVar[bool] = False


class ConfigError(SgpoError):
    """A configuration breaks a rule; the message names the key path, the rule and the value."""


class DataError(SgpoError):
    """Problems, tokenizers or models cannot be read or do not fit together."""


class WireError(SgpoError):
    """A message is malformed, truncated or too large. The receiver drops it and counts one rejection."""


class ProtocolMismatch(WireError):
    """A message has another protocol version."""


class HubError(SgpoError):
    """The hub cannot bind its address, cannot be reached, or refuses a member."""


class HubAbsent(HubError):
    """No hub has answered this process, or has taken it as a member, for too long."""

    may_pass = True


class Refusal(HubError):
    """The hub refuses an actor; `final` says that the refusal is permanent for this actor."""

    may_pass = True

    def __init__(self, message: str, *, final: bool) -> None:
        super().__init__(message)
        self.final = final


class SessionError(SgpoError):
    """A Torch RPC session failed; the message names the node and the phase."""

    may_pass = True


class WeightsError(SgpoError):
    """The names, shapes or checksums of received weights differ from the expected ones."""


class Superseded(WeightsError):
    """A newer version has overwritten the requested one in the weight store: ask for the manifest again."""


class EngineError(SgpoError):
    """An inference engine cannot start or cannot serve."""

    may_pass = True


class CheckFailed(EngineError):
    """A check found something that cannot work; the error holds what it found and the remedy."""

    may_pass = False

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(f"{found}; {remedy}")
        self.found, self.remedy = found, remedy


class CheckWarning(CheckFailed):
    """A check found something that works but that the user should know about."""


class EndpointError(SgpoError):
    """A server of chat completions cannot serve any request: wrong key, model or address."""


class CheckpointError(SgpoError):
    """A checkpoint cannot be written or read."""


class RunFailed(SgpoError):
    """The hub, the learner or all actors of a local run ended unexpectedly."""


class Interrupted(SgpoError):
    """A signal has ended the process in good order; the message, if any, says how to go on.

    Args:
        code: the exit code; the default is that of errors, for a process that another one told to end.
    """

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


class DeadlineExceeded(SgpoError):
    """A wait timed out.

    Args:
        subject: the process that waited, or the server or process that it waited for.
        expected: the answer or event that did not come.
        seconds: how long the process waited.
    """

    may_pass = True

    def __init__(self, subject: str, expected: str, seconds: float) -> None:
        super().__init__(f"{subject}: no {expected} within {seconds:g} s")
