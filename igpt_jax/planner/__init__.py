"""Will a run fit a group of devices that is not here, and how fast will it be? The very training step, compiled for it.

    flops.py        FLOPs, counted in the jaxpr
    program.py      bytes to memory and between devices, read in the compiled text
    targets.py      the devices of a topology, without any of them
    compilation.py  one step compiled, in a process of its own, and what the compiler says: a verdict
    verdicts.py     asks for verdicts, and keeps them
    roofline.py     from a verdict to seconds, calibrated by real runs
    search.py       which mesh, which parts, which remat: estimates, then verdicts for the best

Every figure has one of four kinds of evidence (`Evidence`), which is printed beside it.
"""

import enum


class Evidence(enum.StrEnum):
    """How a figure came about."""
    EXACT = "exact"  # from shapes and shardings
    COMPILER = "compiler"  # the vendor's compiler says so of the very step
    ESTIMATE = "estimate"  # read from the compiled text or a formula
    UNCALIBRATED = "uncalibrated"  # a model that no real run has corrected
    CALIBRATED = "calibrated"  # that model, corrected by real runs on this kind of device
