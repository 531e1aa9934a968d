"""Compiles a slow program in a thread, and checks that `watchdog.compiling` notices most of that time."""

import threading
import time

import jax

from igpt_jax.runtime.watchdog import compiling

jax.config.update("jax_enable_compilation_cache", False)


def slow(x):
    for _ in range(300):
        x = jax.numpy.sin(x @ x) + x.T
    return x


seen = []
thread = threading.Thread(target=lambda: jax.jit(slow).lower(jax.numpy.ones((8, 8))).compile())
assert not compiling()
thread.start()
while thread.is_alive():
    seen.append(compiling())
    time.sleep(0.01)
assert sum(seen) > len(seen) / 4, (sum(seen), len(seen))
