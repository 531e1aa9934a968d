"""Measures the memory of conversions: python conversion_memory.py FOLDER LARGEST.

Converts FOLDER/hf to ours and back, and to OpenAI's format and back. LARGEST is the size of the largest tensor in MiB;
each conversion may add twice as much to the process's anonymous memory, above what it held before.
"""

import pathlib
import sys
import threading
import time

import tensorflow  # noqa: F401, since what it takes by itself does not count

from igpt_jax.config import ConvertConfig
from igpt_jax.jobs import convert

STEPS = (("huggingface:hf", "orbax:ours"), ("orbax:ours", "huggingface:back"), ("orbax:ours", "openai:oa"),
         ("openai:oa", "orbax:again"))


def anonymous():
    """This process's anonymous memory in bytes, without mapped files."""
    status = pathlib.Path("/proc/self/status").read_text()
    line, = (line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def main(folder, largest):
    samples, added = [], {}

    def watch():
        while True:
            samples.append(anonymous())
            time.sleep(0.002)

    threading.Thread(target=watch, daemon=True).start()
    for source, target in STEPS:
        base = anonymous()
        samples.clear()
        paths = (name.replace(":", f":{folder}/") for name in (source, target))
        convert.run(ConvertConfig("convert", *paths, palette=f"{folder}/palette.npy", certificate="hashes"),
                    f"{folder}/{target}")
        added[f"{source} -> {target}"] = (max(samples) - base) / 2**20
    print(added)
    assert max(added.values()) < 2 * float(largest), added


if __name__ == "__main__":
    main(*sys.argv[1:])
