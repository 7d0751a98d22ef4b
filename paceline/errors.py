"""Every error Paceline raises on purpose, in one tree.

PacelineError
├── ConfigError            an unknown key, a value out of range, settings that contradict each other
├── DeviceError            a device was asked for that this machine does not have
├── RequestError           a request that cannot be served as it stands
│   ├── BadGrammar         a grammar or schema that does not compile, or is too much to follow
│   ├── BadField           a field of a request body that is missing, of the wrong type, or not supported
│   ├── ContextExceeded    the prompt (and the wanted output) does not fit the context
│   └── EmptyPrompt        nothing to continue
├── InputError             a file or an edit that cannot be used
│   ├── NotText            a binary file, or bytes that are not UTF-8
│   ├── EmptyEdit          the edit changes nothing because it says nothing
│   └── EditNotFound       the edit matches nowhere in the file
├── ModelError             a model that cannot be loaded
│   ├── UnknownArchitecture
│   ├── BadWeights         truncated, wrong digest, missing or unexpected tensors
│   └── UnknownModel       a name that `pull` does not know and the disk does not have
├── PullError              a download that did not finish
│   ├── Offline
│   ├── DigestMismatch
│   └── DiskFull
├── ServeError             what a server answers without asking the engine
│   ├── Unauthorized       no API key, or a wrong one
│   ├── NotFound           a path that is served by nothing
│   ├── BodyTooLarge       a request body over the limit
│   ├── Overloaded         the queue is full, or the server is shutting down; try again later
│   ├── SlowBody           the body did not come whole within its time
│   ├── TimedOut           the request's time is over
│   ├── EngineStopped      the engine's thread has ended; the log says why
│   └── EngineFailed       the engine failed on this request alone; the log says why
├── FlaggedResult          a merge whose checks failed; it was not written
└── Cancelled              the caller cancelled the request
"""

from __future__ import annotations

__all__ = [
    "BadField",
    "BadGrammar",
    "BadWeights",
    "BodyTooLarge",
    "Cancelled",
    "ConfigError",
    "ContextExceeded",
    "DeviceError",
    "DigestMismatch",
    "DiskFull",
    "EditNotFound",
    "EmptyEdit",
    "EmptyPrompt",
    "EngineFailed",
    "EngineStopped",
    "FlaggedResult",
    "InputError",
    "ModelError",
    "NotFound",
    "NotText",
    "Offline",
    "Overloaded",
    "PacelineError",
    "PullError",
    "RequestError",
    "ServeError",
    "SlowBody",
    "TimedOut",
    "Unauthorized",
    "UnknownArchitecture",
    "UnknownModel",
]


class PacelineError(Exception):
    """Base of the tree. `str(error)` is one sentence that says what to do."""


class ConfigError(PacelineError, ValueError):
    """An unknown key, a value out of range, or settings that contradict each other."""


class DeviceError(PacelineError):
    """A device was asked for that this machine does not have."""


class RequestError(PacelineError, ValueError):
    """A request that cannot be served as it stands."""


class BadField(RequestError):
    """A field of a request body that is missing, of the wrong type, or not supported. `field` is its path, or empty."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class BadGrammar(RequestError):
    """A grammar, or a JSON schema to hold output to, that does not compile, or that is too much to follow to its end."""


class ContextExceeded(RequestError):
    """The prompt (and the wanted output) does not fit the model's context."""


class EmptyPrompt(RequestError):
    """There is no token to continue from."""


class InputError(PacelineError, ValueError):
    """A file or an edit that cannot be used."""


class NotText(InputError):
    """A binary file, or bytes that are not UTF-8."""


class EmptyEdit(InputError):
    """The edit says nothing."""


class EditNotFound(InputError):
    """The edit matches nowhere in the file."""


class ModelError(PacelineError):
    """A model that cannot be loaded."""


class UnknownArchitecture(ModelError):
    """The model's architecture is none that Paceline knows; the message names the nearest."""


class BadWeights(ModelError):
    """A truncated file, a wrong digest, or tensors missing or unexpected."""


class UnknownModel(ModelError):
    """A name that `paceline pull` does not know and the disk does not have."""


class PullError(PacelineError):
    """A download that did not finish. What arrived is kept and resumed from."""


class Offline(PullError):
    """The source cannot be reached."""


class DigestMismatch(PullError):
    """What arrived is not what was published."""


class DiskFull(PullError):
    """No room left; the partial file is kept."""


class ServeError(PacelineError):
    """What a server answers without asking the engine."""


class Unauthorized(ServeError):
    """No API key, or a wrong one."""


class NotFound(ServeError):
    """A path that is served by nothing."""


class BodyTooLarge(ServeError):
    """A request body over the limit."""


class Overloaded(ServeError):
    """The queue is full, or the server is shutting down; `retry_after` seconds from now it may not be."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class SlowBody(ServeError):
    """The request's body did not come whole within its time."""


class TimedOut(ServeError):
    """The request's time is over before its answer is written."""


class EngineStopped(ServeError):
    """The engine's thread has ended; the log says why."""


class EngineFailed(ServeError):
    """A bug or a full memory in a step of this request; the log says which. The engine goes on with others."""


class FlaggedResult(PacelineError):
    """A merge whose checks failed; nothing was written. `reasons` holds what the checks said."""

    def __init__(self, reasons: tuple[str, ...]) -> None:
        super().__init__("the merge was flagged: " + "; ".join(reasons))
        self.reasons = reasons


class Cancelled(PacelineError):
    """The caller cancelled the request."""
