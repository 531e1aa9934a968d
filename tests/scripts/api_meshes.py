"""The Python interface on eight devices against one, in float64."""

import sys

import numpy as np

import igpt_jax

folder = sys.argv[1]
images = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), np.uint8)
for run in ("pretrain", "finetune"):
    one, many = (igpt_jax.load(f"{folder}/runs/{run}", precision="float64", **where)
                 for where in ({"device": "cpu"}, {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}}))
    for call in (lambda model: model.features(images, "all"), lambda model: model.nats(images, per_pixel=True),
                 lambda model: model.probabilities(images)):
        np.testing.assert_allclose(call(many), call(one), rtol=1e-8, atol=1e-8)
for call in (lambda model: model.complete(images, rows=5, n=2),
             lambda model: list(model.complete_by_row(images[:3], rows=5))[-1]):
    np.testing.assert_array_equal(call(many), call(one))
