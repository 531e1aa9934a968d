"""Writes one HTML page about any set of workdirs: configs, curves, tables, pictures, and a comparison with the paper.

Writes report.html, which is self-contained and has no scripts, and its charts as SVG files in figures/.
"""

from typing import Any

import jax

from igpt_jax import report, storage
from igpt_jax.config import ReportConfig, UserError
from igpt_jax.metrics.logging import say
from igpt_jax.report.runs import load
from igpt_jax.storage import side_files


def run(config: ReportConfig, workdir: str) -> dict[str, Any]:
    """Writes the report. Returns the number of `workdirs` on the page, and its size in `bytes`.

    Raises:
      UserError: `workdirs` names no workdir of a job.
    """
    if not config.workdirs:
        raise UserError("workdirs is empty. Set --config.workdirs to workdirs of jobs, such as 'runs/*'.")
    found = load(config.workdirs)
    page, charts = report.render(found)
    folder = storage.path(workdir)
    if jax.process_index() == 0:
        side_files.no_longer_done(folder)
        for name, svg in charts.items():
            storage.publish(folder / "figures" / name, svg)
        storage.publish(folder / "report.html", page)
        say(f"{folder / 'report.html'}: {len(found)} workdirs")
    return {"workdirs": len(found), "bytes": len(storage.encoded(page))}
