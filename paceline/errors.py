"""Every error Paceline raises on purpose, in one tree.

PacelineError
├── ConfigError            an unknown key, a value out of range, settings that contradict each other
├── DeviceError            a device was asked for that this machine does not have
├── RequestError           a request that cannot be served as it stands
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
├── FlaggedResult          a merge whose checks failed; it was not written
└── Cancelled              the caller cancelled the request
"""

from __future__ import annotations

__all__ = [
    "BadWeights",
    "Cancelled",
    "ConfigError",
    "ContextExceeded",
    "DeviceError",
    "DigestMismatch",
    "DiskFull",
    "EditNotFound",
    "EmptyEdit",
    "EmptyPrompt",
    "FlaggedResult",
    "InputError",
    "ModelError",
    "NotText",
    "Offline",
    "PacelineError",
    "PullError",
    "RequestError",
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


class FlaggedResult(PacelineError):
    """A merge whose checks failed; nothing was written. `reasons` holds what the checks said."""

    def __init__(self, reasons: tuple[str, ...]) -> None:
        super().__init__("the merge was flagged: " + "; ".join(reasons))
        self.reasons = reasons


class Cancelled(PacelineError):
    """The caller cancelled the request."""
