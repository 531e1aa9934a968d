"""A process that does not move ends with exit code 76 and its stacks; one that compiles or is only slow does not."""

import pytest

STUCK = """
import time
from igpt_jax.runtime.watchdog import Watchdog
with Watchdog({allowance}) as watchdog:
    for step in range({steps}):
        watchdog.beat(f"doing step {{step}}")
        time.sleep({seconds})
    {then}
print("came through")
"""
COMPILES = """import ctypes, jax._src.compiler
    exec(compile("sleep(5)", jax._src.compiler.__file__, "exec"), {"sleep": ctypes.CDLL(None).sleep})"""


def test_what_stands_still_is_ended_with_its_stacks(run_job):
    """Seen to fail with a watchdog that counts from its own start."""
    done = run_job(script=STUCK.format(allowance=2, steps=5, seconds=0.5, then="time.sleep(10**6)"))
    assert done.returncode == 76
    assert "process 0 has not moved for 2 s while doing step 4" in done.stderr
    assert 'File "<string>", line 8 in <module>' in done.stderr, done.stderr


@pytest.mark.parametrize("steps, seconds, then", [(8, 0.5, "pass"), (1, 0, COMPILES)], ids=["slow", "compiles"])
def test_what_is_slow_or_compiles_goes_on(run_job, steps, seconds, then):
    """Seen to fail with beats that are not looked at, and without the look for the compiler."""
    done = run_job(script=STUCK.format(allowance=3, steps=steps, seconds=seconds, then=then))
    assert done.returncode == 0 and "came through" in done.stdout, done.stderr


def test_the_compiler_is_where_the_watchdog_looks_for_it(run_job):
    """Another version of JAX may compile elsewhere: seen to fail with another file's name."""
    done = run_job(script="""
import threading, time, jax
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
""")
    assert done.returncode == 0, done.stderr
