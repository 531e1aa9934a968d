"""The kinds of evidence behind a figure of the planner."""

import enum


class Evidence(enum.StrEnum):
    """Where a figure comes from."""
    EXACT = "exact"  # from shapes and shardings
    COMPILER = "compiler"  # reported by the vendor's compiler for this very step
    ESTIMATE = "estimate"  # read from the compiled text or a formula
    UNCALIBRATED = "uncalibrated"  # the roofline at the speed of public runs
    CALIBRATED = "calibrated"  # the same, scaled by the user's runs on this kind of device
