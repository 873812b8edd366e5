"""The errors of this package, and the reasons for which a candidate is turned away.

    AccelerandoError
    ├── UsageError            the caller's mistake; raised before any work starts, in the caller's words
    │   ├── GoalError         a goal that does not parse, or contradicts itself
    │   ├── DataError         data or a metric that does not fit the model
    │   ├── ModelError        a model that can't be called, or that answers with NaN
    │   ├── UnknownModelError a name that the server does not have
    │   └── MissingExtraError a package that this call needs is not installed
    ├── BundleError           a folder that can't be trusted; every way has a name in `BundleError.code`
    ├── ServingError          a request that the runtime did not answer
    │   ├── OverloadedError   refused at once: it could not have been answered in time, or the queue is full
    │   ├── DeadlineError     its deadline passed while it waited
    │   ├── RowsError         the model failed on its rows; other requests go on
    │   └── ClosedError       the model is closed, or not loaded
    ├── BrokenPluginError     a technique or a backend that does not keep its contract
    └── RefusalError          raised inside a technique or a backend; `attempt` turns it into a `Refused` trial

Every message says what was given, what must hold, and what to do.
"""

from __future__ import annotations

from enum import Enum
from typing import Any


class AccelerandoError(Exception):
    """The root of every error that this package raises on purpose."""


class UsageError(AccelerandoError):
    """The caller's mistake: nothing has been done yet, and nothing was written."""


class GoalError(UsageError):
    """A goal that does not parse, or that contradicts itself."""


class DataError(UsageError):
    """Data or a metric that does not fit the model."""


class ModelError(UsageError):
    """A model that can't be called with the data, or whose own outputs are not finite."""


class UnknownModelError(UsageError):
    """A name or a version that the server does not have."""


class MissingExtraError(UsageError):
    """A package is missing; the message holds the pip line that brings it."""


class BundleError(AccelerandoError):
    """A folder that is not a bundle, or can't be trusted.

    `code` names what is wrong in one word (`docs/format.md` lists them all).
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"[{code}] {message}")
        self.code, self.message = code, message

    def __reduce__(self) -> tuple[type[BundleError], tuple[str, str]]:
        return BundleError, (self.code, self.message)


class ServingError(AccelerandoError):
    """A request that the runtime did not answer."""


class OverloadedError(ServingError):
    """Refused at once: no rung could have answered it in time, or the queue is full.  Try again later."""


class DeadlineError(ServingError):
    """Its deadline passed while it waited; nothing was computed for it."""


class RowsError(ServingError):
    """The model failed on these rows; requests that shared their batch were answered."""


class ClosedError(ServingError):
    """The model was closed, or is not loaded."""


class BrokenPluginError(AccelerandoError):
    """A technique or a backend that does not keep its contract: it stops the run, it is never skipped."""


class Reason(Enum):
    """Why a candidate was turned away, and what to do about it."""

    MISSING_PACKAGE = "a package is not installed", "install it (`accelerando doctor` prints the line)"
    MISSING_TOOL = "a tool outside Python is missing", "install it (`accelerando doctor` says how)"
    NOT_NATIVE = "this machine has no instructions for it", "try it on a machine that has them"
    WRONG_FORM = "the model is not in the form that this step takes", "choose steps whose forms chain"
    NOTHING_TO_DO = "there was nothing for it to change", "nothing: the model is already that way"
    UNSUPPORTED = "the model holds something that it can't handle", "see the detail; other routes go on"
    NO_TRAINING_DATA = "there is no training data, and it learns from some", "give `train=`, rows like those of `data=`"
    EXPORT_FAILED = "the model can't be exported", "see the exporter's own reason in the detail"
    WRONG_OUTPUT = (
        "it answers with other shapes or types than the original",
        "a defect of the backend or the technique",
    )
    NOT_FINITE = "it answers with NaN or infinity", "a wider calibration, or a milder technique"
    NOT_SAME = "it should be exact, but answers differently", "a defect of the backend or the technique"
    BELOW_QUALITY = "it loses more quality than the goal allows", "a milder technique, or a wider bound"
    TOO_SLOW = "it can't win: others are clearly faster and no worse", "nothing: the better ones stay"
    DIVERGED = "its training diverged", "a smaller learning rate, or inputs of a usual scale"
    OUT_OF_MEMORY = "it took more memory than the limit", "raise `memory_limit`, or a smaller batch"
    TIMED_OUT = "it took longer than its time limit", "raise the budget"
    CRASHED = "its process died or raised an error", "see the detail"
    NO_ROOM = "the disk is full", "free some space and resume"
    DAMAGED = "its files were not whole when they were read back", "see the detail"

    def __init__(self, happened: str, remedy: str) -> None:
        self.happened = happened
        self.remedy = remedy


class RefusalError(AccelerandoError):
    """A technique or a backend turns a model away.

    Args:
        reason: what happened, and what to do.
        detail: the particulars, in a line or a few; may hold the library's own words.
    """

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason.happened}: {detail}" if detail else reason.happened)
        self.reason = reason
        self.detail = detail
        self.step: int | None = None  # number of the recipe's step that refused; None where it was not a step
        self.evidence: Any = None  # what had been measured by then, where something had
        self.speedup: Any = None

    def __reduce__(self) -> tuple[type[RefusalError], tuple[Reason, str], dict[str, Any]]:
        return RefusalError, (self.reason, self.detail), self.__dict__  # it travels from child to parent
