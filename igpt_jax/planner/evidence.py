"""The kinds of evidence behind a figure of the planner."""

import enum


class Evidence(enum.StrEnum):
    """How a figure came about."""
    EXACT = "exact"  # from shapes and shardings
    COMPILER = "compiler"  # the vendor's compiler says so of the very step
    ESTIMATE = "estimate"  # read from the compiled text or a formula
    UNCALIBRATED = "uncalibrated"  # a model that no real run has corrected
    CALIBRATED = "calibrated"  # that model, corrected by real runs on this kind of device
