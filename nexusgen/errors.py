"""Every error that a user can meet, as one picklable tree; the command line maps it to exit codes.

`UsageError` and `ConfigError` end a command with exit code 2, every other `NexusgenError` with 1.
Messages name the thing, the value found, the value wanted and the fix.
"""


class NexusgenError(Exception):
    """Base of all errors raised on purpose by this project; its message is meant for a person."""


class UsageError(NexusgenError):
    """The command was called in a way that can't work (exit code 2)."""


class ConfigError(UsageError):
    """A configuration key or value is unknown or out of range (exit code 2)."""


class InputError(NexusgenError):
    """Something named as input is missing, unreadable or of the wrong kind."""


class ShapeError(NexusgenError):
    """Arrays that must agree in shape don't."""


class ModelError(NexusgenError):
    """A model folder or checkpoint is incomplete, damaged or of another layout."""


class FingerprintError(ModelError):
    """Data or weights were made by another model than the one at hand."""


class QuarantineError(NexusgenError):
    """More samples were quarantined than the job allows."""


class ResourceError(NexusgenError):
    """The machine or cluster has less of something than the job needs."""


class GateError(NexusgenError):
    """A version was refused by the gate of `promote`."""


class SampleError(NexusgenError):
    """One sample can't be used; it goes to quarantine with its reason code.

    Never ends a job by itself: the reader turns it into a quarantine row.
    """

    def __init__(self, reason_code: str, reason: str, member: str = "") -> None:
        super().__init__(reason_code, reason, member)
        self.reason_code = reason_code
        self.reason = reason
        self.member = member

    def __str__(self) -> str:
        where = f" ({self.member})" if self.member else ""
        return f"{self.reason_code}: {self.reason}{where}"
