"""Images per second, FLOP/s and MFU of a run."""

import contextlib
import time
from collections.abc import Callable, Iterator


def mfu(flops_per_second: float, peak_flops: float) -> float:
    """Model FLOPs utilization: model FLOP/s per device over the chip's peak dense bf16 FLOP/s (see `model.flops`)."""
    return flops_per_second / peak_flops


class Throughput:
    """Speed of training, without compilation, evaluation and checkpoints.

    The first `step` starts the clock, since that step compiles. What runs inside `paused()` does not count; let the
    pending steps finish before it (read their metrics), or they run on time that is not counted.

    Args:
      batch_size: images per step over all devices.
      tokens: tokens per image.
      flops_per_image: `train_flops_per_image`.
      devices: number of devices over all processes.
      peak_flops: of one device; None leaves MFU out.
      clock: seconds.
    """

    def __init__(self, batch_size: int, tokens: int, flops_per_image: float, devices: int,
                 peak_flops: float | None = None, clock: Callable[[], float] = time.perf_counter):
        self._batch_size, self._tokens = batch_size, tokens
        self._flops_per_image, self._devices, self._peak_flops = flops_per_image, devices, peak_flops
        self._clock = clock
        self._since: float | None = None
        self._steps = 0
        self._earlier_steps, self._earlier_seconds = 0, 0.0

    def step(self) -> None:
        """Counts one finished step."""
        if self._since is None:
            self._since = self._clock()
        else:
            self._steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time inside: `with throughput.paused(): evaluate(...)`."""
        start = self._clock()
        try:
            yield
        finally:
            if self._since is not None:
                self._since += self._clock() - start

    def read(self) -> dict[str, float]:
        """Rates since the last `read`; empty before two steps are done."""
        if not self._steps:
            return {}
        now = self._clock()
        steps, seconds = self._steps, now - self._since
        self._since, self._steps = now, 0
        self._earlier_steps += steps
        self._earlier_seconds += seconds
        return self._rates(steps, seconds)

    def overall(self) -> dict[str, float]:
        """Rates of the whole run up to the last `read`; empty where nothing was measured."""
        return self._rates(self._earlier_steps, self._earlier_seconds) if self._earlier_steps else {}

    def _rates(self, steps: int, seconds: float) -> dict[str, float]:
        images = steps * self._batch_size / max(seconds, 1e-9)
        flops = images * self._flops_per_image / self._devices
        rates = {"images_per_second": images, "tokens_per_second": images * self._tokens,
                 "model_tflops_per_second_per_device": flops / 1e12}
        if self._peak_flops:
            rates["mfu"] = mfu(flops, self._peak_flops)
        return rates
