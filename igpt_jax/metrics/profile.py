"""Traces of some steps, on request: what each device and the host did when."""

import pathlib
import tempfile

import jax

from igpt_jax import storage
from igpt_jax.metrics.logging import say


class Profile:
    """Traces the steps from the first to the last of `steps` on process 0 and leaves the files in WORKDIR/profile.

    Args:
      workdir: local path, gs:// or s3://.
      steps: (first, last); empty: none.
    """

    def __init__(self, workdir: str, steps: tuple[int, ...]):
        self._target, self._steps = storage.path(workdir) / "profile", steps if jax.process_index() == 0 else ()
        self._folder: tempfile.TemporaryDirectory | None = None

    def before(self, step: int) -> None:
        """Starts or ends the trace where it is time; call it before each step."""
        if self._steps and not self._folder and self._steps[0] <= step <= self._steps[1]:
            self._folder = tempfile.TemporaryDirectory()  # the profiler writes to disks only
            jax.profiler.start_trace(self._folder.name)
        elif self._folder and step > self._steps[1]:
            self.close()

    def close(self) -> None:
        """Ends the trace where there is one, and says how to look at it."""
        if not self._folder:
            return
        folder, self._folder, self._steps = self._folder, None, ()
        try:
            jax.profiler.stop_trace()
            root = pathlib.Path(folder.name)
            for file in filter(pathlib.Path.is_file, root.rglob("*")):
                storage.publish(self._target / str(file.relative_to(root)), file.read_bytes())
        except Exception as error:  # of any kind: no profile is worth a run
            say(f"no profile: {' '.join(str(error).split())}. Training continues.")
            return
        finally:
            folder.cleanup()
        say(f"profile: xprof --logdir={self._target} --port=8791 (pip install xprof); or open its *.trace.json.gz at "
            "https://ui.perfetto.dev")
