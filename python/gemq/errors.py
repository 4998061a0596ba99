"""Errors that a user can act on. The command line prints their text in one line and exits with 2."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class GemqError(Exception):
    """Base of gemq's own errors."""


class UnsupportedModelError(GemqError, NotImplementedError):
    """The model's family or structure is not supported yet."""


class CheckpointError(GemqError, ValueError):
    """A checkpoint is truncated, inconsistent, of a newer version or not gemq's at all."""


class CalibrationError(GemqError, ValueError):
    """Calibration or evaluation text is missing, empty or too short."""


class NumberError(GemqError, ArithmeticError):
    """NaN or infinity came out of a computation, which says where and what to change."""


class DeviceError(GemqError, RuntimeError):
    """The request needs a device that this machine does not have."""


class OutOfMemoryError(GemqError, MemoryError):
    """A model or its cache does not fit; the message says what would."""


class DistributedError(GemqError, RuntimeError):
    """A process of a job of several processes ended or does not answer; the others end with this error."""


class FailedElsewhereError(DistributedError):
    """Rank 0 failed and reported the reason; the other processes end with this error."""


class ResourceError(GemqError, RuntimeError):
    """Memory or disk is short for what was asked; the message says what takes how much, and what would fit."""
