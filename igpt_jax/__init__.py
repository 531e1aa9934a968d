"""Image GPT (Chen et al., 2020) in JAX: pretraining, evaluation and sampling at any scale."""

import os

# etils would import TensorFlow for gs:// paths, 5 seconds and 665 MiB; fsspec serves them instead.
os.environ.setdefault("EPATH_USE_TF", "0")
# TensorFlow reads files here and computes nothing; where it may use oneDNN it prints four lines when it is imported.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

__version__ = "0.1.0"
