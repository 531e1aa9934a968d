"""Runs the verify job as if a package were not installed: python missing_package.py PACKAGE."""

import sys

sys.modules[sys.argv[1]] = None

from igpt_jax.__main__ import main  # noqa: E402

sys.exit(main(["verify", "--workdir=w"]))
