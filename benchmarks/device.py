"""Measures what a device can do: the product of two matrices, and a copy in its memory.

    python benchmarks/device.py [--side 8192] [--mib 4096] [--json FILE]

The product is of bfloat16 values drawn at random, because chips are faster on constant ones. The copy's bytes are those
read and those written. Both are medians, as shares of the vendor's figures where the chip is known.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import exits
import jax
import jax.numpy as jnp

from igpt_jax import storage
from igpt_jax.parallel import topology


def seconds(run: Callable, *arrays: jax.Array, rounds: int = 20) -> float:
    """Median seconds of run(*arrays)."""
    jax.block_until_ready(run(*arrays))  # compiles
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=exits.count, default=8192, help="of the matrices")
    parser.add_argument("--mib", type=exits.count, default=4096, help="size of the array that is copied, MiB")
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    one, other = (jax.random.normal(jax.random.key(i), (options.side, options.side), jnp.bfloat16) for i in range(2))
    array = jnp.ones(options.mib * 2**18, jnp.float32)
    flops = 2 * options.side**3 / seconds(jax.jit(jnp.matmul), one, other)
    bandwidth = 2 * array.nbytes / seconds(jax.jit(lambda x: x + 1), array)
    device = jax.devices()[0]
    chip = topology.chip_for(device.device_kind)
    figures = {"device": device.device_kind, "jax": jax.__version__, "product_flops": flops,
               "copy_bytes_per_second": bandwidth, "share_of_peak_flops": chip and flops / chip.peak_bf16_flops,
               "share_of_peak_bandwidth": chip and bandwidth / chip.hbm_bandwidth}
    print(f"{device.device_kind}, jax {jax.__version__}: product {flops / 1e12:.1f} TFLOP/s, copy "
          f"{bandwidth / 1e9:,.0f} GB/s")
    if chip:
        print(f"    {figures['share_of_peak_flops']:.0%} and {figures['share_of_peak_bandwidth']:.0%} of the vendor's")
    if options.json:
        storage.publish(storage.path(options.json), json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    exits.run(main)
