"""Measures the cost of checksums and saves:  python benchmarks/checksums.py [--gib=1]

Times the checksums of a state on the devices, the part of a save that blocks training, a whole save, and a restore
with its checks. Prints a table of medians over --rounds. CPU seconds are those of all threads; on a busy machine they
are a better measure than the time that passed.
"""

import argparse
import dataclasses
import shutil
import statistics
import tempfile
import time

import exits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state")
    parser.add_argument("--rounds", type=exits.count, default=3)
    given = parser.parse_args()
    import jax
    import numpy as np

    from igpt_jax import checkpoint
    from igpt_jax.config import base_config, parse
    from igpt_jax.model.image_gpt import Model
    from igpt_jax.parallel import checksums, sharding
    from igpt_jax.training.steps import abstract_state, init_state

    # An igpt_s with as many layers as make its state (parameters and two moments, float32) --gib large.
    layers = max(1, round(given.gib * 2**30 / (3 * 4 * 12 * 512**2)))
    config = parse("pretrain", base_config("pretrain", f"model=igpt_s,model.layers={layers},keep_newest=1"))
    mesh = sharding.make_mesh(config.mesh)
    built = Model(config.model, 512, 8, config.precision, mesh)
    abstract = abstract_state(built, config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    state = jax.jit(lambda key: init_state(built, config, key), out_shardings=shardings)(jax.random.key(0))
    jax.block_until_ready(state)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    record = checkpoint.Metadata(config, np.zeros((512, 3), np.float32), 8, "none", 0)
    took = {"checksums": [], "save, training blocked": [], "save, whole": [], "restore and compare": []}

    def timed(name: str, run):
        start, cpu = time.perf_counter(), time.process_time()
        found = run()
        took[name].append((time.perf_counter() - start, time.process_time() - cpu))
        return found

    checksums.of_tree(state)  # compiles
    folder = tempfile.mkdtemp()
    try:
        with checkpoint.Checkpoints(folder, config) as checkpoints:
            for step in range(1, given.rounds + 1):
                timed("checksums", lambda: checksums.of_tree(state))

                def save(step: int = step):
                    timed("save, training blocked",
                          lambda: checkpoints.save(state, dataclasses.replace(record, steps_done=step)))
                    checkpoints.wait()

                timed("save, whole", save)
                timed("restore and compare", lambda: checkpoints.restore(lambda _: abstract, record))
    finally:
        shutil.rmtree(folder)
    print(f"state of {size / 2**30:.2f} GiB, {jax.device_count()} x {jax.devices()[0].device_kind}")
    print("| what | seconds | seconds per GiB | CPU seconds per GiB | MB/s |\n|---|---|---|---|---|")
    for name, both in took.items():
        median, cpu = (statistics.median(seconds) for seconds in zip(*both, strict=True))
        per_gib = size / 2**30
        print(f"| {name} | {median:.2f} | {median / per_gib:.2f} | {cpu / per_gib:.2f} | {size / 1e6 / median:,.0f} |")


if __name__ == "__main__":
    exits.run(main)
