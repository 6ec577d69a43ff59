"""Errors of this package that a caller may want to catch by name."""

from __future__ import annotations


class EasyDeLError(Exception):
    """Base class of the errors that are neither a plain `ValueError` nor a `TypeError`."""


class CheckpointError(EasyDeLError, ValueError):
    """A checkpoint is missing, broken, or does not fit the model; the message names file, tensor and cure."""


class ShardingError(EasyDeLError, ValueError):
    """A mesh or a partition rule cannot be used; the message names the parameter, the rule and the cure."""


class UnsupportedError(EasyDeLError, ValueError):
    """Something known but not offered here was asked for; the message contains "not supported"."""


class TrainingError(EasyDeLError, ValueError):
    """A run cannot begin or go on; the message says what is saved and what to change."""


class DistributedError(EasyDeLError, ValueError):
    """The processes of a run cannot find one another, or do not fit together; the message says which, and why."""
