"""A job as if TensorFlow were not installed: python without_tensorflow.py ARGUMENTS..."""

import sys

sys.modules["tensorflow"] = None

from igpt_jax.__main__ import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
