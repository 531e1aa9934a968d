"""A run whose loss is NaN on 6 steps of the data order: python bad_window.py LOG ARGUMENTS...

Steps 12 to 17 of the order read image 0 alone, and on such a batch the loss is NaN. LOG gets a line with each step of
the order that the run asks for.
"""

import sys

import jax.numpy as jnp

from igpt_jax.__main__ import main
from igpt_jax.data import order
from igpt_jax.model import objectives

batch, loss = order.batch, objectives.Autoregressive.loss
log = open(sys.argv[1], "a")


def logged_batch(seed, step, *rest):
    log.write(f"{step}\n")
    log.flush()
    return batch(seed, step, *rest) * (not 12 <= step < 18)


order.batch = logged_batch
objectives.Autoregressive.loss = lambda self, logits, tokens, view: jnp.where(
    (tokens == tokens[0]).all(), jnp.nan, loss(self, logits, tokens, view))
sys.exit(main(sys.argv[2:]))
