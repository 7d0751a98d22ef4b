"""The exceptions that Paceline raises, in one tree.

PacelineError
├── ConfigError            an unknown key, a value out of range, settings that contradict each other
├── DeviceError            a device was asked for that this machine does not have
├── RequestError           a request that cannot be served in its form
│   ├── BadGrammar         a grammar or schema that does not compile, or exceeds a limit
│   ├── BadField           a field of a request body that is missing, of the wrong type, or not supported
│   ├── ContextExceeded    the prompt (and the wanted output) does not fit the context
│   └── EmptyPrompt        a prompt without tokens
├── InputError             a file or an edit that cannot be used
│   ├── NotText            a binary file, or bytes that are not UTF-8
│   ├── EmptyEdit          the edit is empty, or changes nothing
│   └── EditNotFound       the edit, or a part of it, does not match the file
├── ModelError             a model that cannot be loaded
│   ├── UnknownArchitecture an architecture that is not supported
│   ├── BadWeights         truncated, wrong digest, missing or unexpected tensors
│   ├── BadDrafter         a drafter that is damaged, or was trained for another target
│   └── UnknownModel       neither a known model's name nor a file
├── PullError              a download that did not finish
│   ├── Offline            the source cannot be reached
│   ├── DigestMismatch     the file received is not the one published
│   └── DiskFull           no space left
├── ServeError             a request that the server rejects or ends by itself
│   ├── Unauthorized       no API key, or a wrong one
│   ├── NotFound           a path that the server does not have
│   ├── BodyTooLarge       a request body over the limit
│   ├── Overloaded         the queue is full, or the server is shutting down; try again later
│   ├── SlowBody           the body did not arrive in time
│   ├── TimedOut           the request exceeded its time limit
│   ├── EngineStopped      the engine's thread has ended; the log says why
│   └── EngineFailed       the engine failed on this request alone; the log says why
├── FlaggedResult          a merge whose checks failed; it was not written
└── Cancelled              the caller cancelled the request
"""

from __future__ import annotations

__all__ = [
    "BadDrafter",
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
    """The base class. `str(error)` is one sentence: the subject, what is wrong, and what to do."""


class ConfigError(PacelineError, ValueError):
    """An unknown key, a value out of range, or settings that contradict each other."""


class DeviceError(PacelineError):
    """A device was requested that this machine does not have."""


class RequestError(PacelineError, ValueError):
    """A request that cannot be served in its form."""


class BadField(RequestError):
    """A field of a request body that is missing, of the wrong type, or not supported. `field` is its path, or empty."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class BadGrammar(RequestError):
    """A grammar or JSON schema for constrained decoding that does not compile, or exceeds a limit."""


class ContextExceeded(RequestError):
    """The prompt (and the wanted output) does not fit the model's context."""


class EmptyPrompt(RequestError):
    """The prompt has no token."""


class InputError(PacelineError, ValueError):
    """A file or an edit that cannot be used."""


class NotText(InputError):
    """A binary file, or bytes that are not UTF-8."""


class EmptyEdit(InputError):
    """The edit is empty, or changes nothing."""


class EditNotFound(InputError):
    """The edit, or a part of it, does not match the file."""


class ModelError(PacelineError):
    """A model that cannot be loaded."""


class UnknownArchitecture(ModelError):
    """The model's architecture is not supported. The message names the nearest one that is."""


class BadWeights(ModelError):
    """A truncated or damaged file, a wrong digest, or missing or unexpected tensors."""


class BadDrafter(ModelError):
    """A damaged drafter, missing or unexpected tensors, or shapes, layers or a vocabulary that are not the target's."""


class UnknownModel(ModelError):
    """The name is neither that of a known model nor a file."""


class PullError(PacelineError):
    """A download that did not finish. The next pull resumes it."""


class Offline(PullError):
    """The source cannot be reached."""


class DigestMismatch(PullError):
    """The file received is not the one published."""


class DiskFull(PullError):
    """No disk space left. The parts received are kept."""


class ServeError(PacelineError):
    """A request that the server rejects or ends by itself."""


class Unauthorized(ServeError):
    """No API key, or a wrong one."""


class NotFound(ServeError):
    """A path that the server does not have."""


class BodyTooLarge(ServeError):
    """A request body over the limit."""


class Overloaded(ServeError):
    """The queue is full, or the server is shutting down. `retry_after` is when to try again, in seconds."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class SlowBody(ServeError):
    """The request body did not arrive within its time limit."""


class TimedOut(ServeError):
    """The request exceeded its time limit."""


class EngineStopped(ServeError):
    """The engine's thread has ended. The log says why."""


class EngineFailed(ServeError):
    """A step of this request failed, by a bug or for lack of memory. The log says why. Other requests continue."""


class FlaggedResult(PacelineError):
    """A merge whose checks failed; nothing was written. `reasons` holds what the checks said."""

    def __init__(self, reasons: tuple[str, ...]) -> None:
        super().__init__("the merge was flagged: " + "; ".join(reasons))
        self.reasons = reasons


class Cancelled(PacelineError):
    """The caller cancelled the request."""
