"""One self-contained HTML page of any set of workdirs: no scripts, no network, light and dark, for screen and paper."""

from igpt_jax.report.page import render, shown

__all__ = [
    "render", "shown",
]
