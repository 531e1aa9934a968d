"""Makes one HTML page of the results in workdirs.

    igpt report --config=report --workdir=runs/report --config.workdirs='runs/quickstart/*'
"""

from igpt_jax.config import base_config


def get_config(arguments: str = ""):
    return base_config("report", arguments)
