"""The compiled training step: dtypes of products, gathers, memory that is reused, and a guard of its cost."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from igpt_jax.config import base_config, parse
from igpt_jax.planner.estimate import estimate
from igpt_jax.planner.verdicts import verdict_for


def test_products_of_the_bfloat16_step_are_bfloat16(python):
    """Every matrix product takes bfloat16 on both sides, also the head's and those of the backward pass.

    Seen to fail with the gradient of the logits left in float32.
    """
    python("compiled_step.py", "products")


def test_weights_are_gathered_layer_by_layer(python):
    """No collective makes the stacked weights of all layers whole, nor their moments: gathers are of one layer, inside
    the loop. Outside of it, only the tables of colors and positions and the head are gathered.

    Seen to fail with the stacked weights constrained to be whole before the scan.
    """
    python("compiled_step.py", "gathers")


def test_gradients_are_summed_in_float32_on_request(python):
    """Each device receives its own part of a weight's gradient, summed in `mesh.reduce_dtype`.

    Seen to fail with the gradient left to XLA's partitioner.
    """
    python("compiled_step.py", "gradients")


def test_the_state_is_updated_in_place(python):
    """The new state takes the memory of the old one; only the metrics come on top.

    Seen to fail without donate_argnums.
    """
    python("compiled_step.py", "update_in_place")


# Figures of the step below with jax 0.10.2 on x86-64. Record one again if it falls, or if it rises for a good reason.
RECORDED = {"recomputed": 1.184, "memory_bytes": 69.6e6, "rearranged_bytes": 2.15e6, "waiting_bytes": 9.74e6,
            "fusion": 682, "dot": 18, "all-gather": 39, "copy": 29, "all-reduce": 4}


def test_the_step_costs_no_more_than_it_did(tmp_path):
    """Guards speed without a clock: recomputed FLOPs, bytes moved and sent, and the instructions that move them.

    Each figure of a small step over 8 devices may be a tenth above the recorded one. Seen to fail with attention in
    blocks of 16 queries (twice the fusions), and with attention recomputed.
    """
    file = tmp_path / "evidence.json"
    settings = "model=igpt_tiny,batch_size=8,image_size=8,model.layers=3,precision=float32,mesh.fsdp=8"
    done = subprocess.run([sys.executable, "benchmarks/compiled.py", "cpu:8", f"--config={settings}", f"--json={file}"],
                          cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT),
                               "XLA_FLAGS": "--xla_force_host_platform_device_count=8"})
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    found |= found["instructions"]
    worse = {name: (found[name], recorded) for name, recorded in RECORDED.items() if found[name] > 1.1 * recorded}
    assert not worse and found["updated_in_place"] == 1.0, (worse, found)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="compiling for TPUs needs libtpu (extra: plan)")
def test_the_step_compiled_for_tpu(python):
    """By the TPU compiler for 8 chips: weights, keys and values are sent in bfloat16 and layer by layer, the state is
    updated in place, and offloaded attention is in the host's memory."""
    python("compiled_step.py", "on_tpu",
           env={"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_COMPILATION_CACHE_DIR": ""})


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="compiling for TPUs needs libtpu (extra: plan)")
@pytest.mark.parametrize(("where", "devices", "memory_bytes"), [
    ("v4:2x2x2", 8, 30e6), ("v5e:2x2", 4, 93e6), ("v6e:2x4", 8, 64e6), ("v5p:2x2x2", 8, 454e6)])
def test_steps_for_tpus_move_what_the_formula_says(tmp_path, monkeypatch, where, devices, memory_bytes):
    """Two layers of iGPT-S: at most 1.06 times the formula's bytes sent, and 1.1 times the recorded memory traffic
    (libtpu 0.0.51, jax 0.10.2). Seen to fail with gradients scattered by their own dims, 1.098 on v4, with a loop over
    blocks, 136 MB on v6e, and where libtpu chooses the layout of products' results, 177 MB."""
    monkeypatch.setenv("IGPT_CACHE", str(tmp_path))
    config = parse("plan", base_config("plan", f"model=igpt_s,model.layers=2,batch_size={2 * devices},topology={where},"
                                               f"mesh.fsdp={devices},model.remat=dots"))
    found = verdict_for(config)
    assert sum(found.collective_bytes.values()) <= 1.06 * sum(estimate(config).collective_bytes.values())
    assert found.memory_bytes <= 1.1 * memory_bytes


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="compiling for TPUs needs libtpu (extra: plan)")
def test_sparsecores_send_while_the_tensorcore_computes(tmp_path, monkeypatch):
    """Seen to fail without `sparsecore`: then nothing overlaps."""
    monkeypatch.setenv("IGPT_CACHE", str(tmp_path))
    found = verdict_for(parse("plan", base_config("plan", "model=igpt_s,model.layers=2,batch_size=16,topology=v6e:2x4,"
                                                          "mesh.fsdp=8,compiler_options=sparsecore")))
    assert found.overlapped_bytes > 0.9 * sum(found.collective_bytes.values()) > 0
