"""Pictures of a page: PNG as data URLs, and samples and completions of several steps of a run, a strip per step.

B images, N pictures, Y rows, X columns, C channels.
"""

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from igpt_jax import storage
from igpt_jax.data.codecs import codec_of
from igpt_jax.evaluation.drawing import UNKNOWN
from igpt_jax.metrics.charts import spaced
from igpt_jax.report.runs import Run, whole

PNG = b"\x89PNG\r\n\x1a\n"
SHOWN = {"completions": 6, "samples": 8}  # pictures in a strip
STEPS_SHOWN = 8  # strips of a run
GAP = 6  # between the pictures of a strip, in pixels
CAPTIONS = {"surprise_means-": "mean loss by position and class: ", "surprise-": "loss maps: "}


class Picture(NamedTuple):
    """A picture in the page: its label, its data URL, and whether its pixels are enlarged to sharp squares."""
    label: str
    url: str
    enlarged: bool = True


class Strips(NamedTuple):
    """Rows of small pictures, one below the other.

    Attributes:
      title: Samples or Completions.
      run: the workdir of the training run, as text.
      rows: top to bottom. Completions begin with the original and the given pictures.
      steps: number of checkpoints.
    """
    title: str
    run: str
    rows: list[Picture]
    steps: int


def picture(file: storage.Path) -> Picture:
    """A PNG file. Raises ValueError if it is none."""
    data = storage.read(file)
    if not data.startswith(PNG):
        raise ValueError("it is no PNG")
    width = int.from_bytes(data[16:20], "big")  # PNG: 8 bytes of signature, then the header chunk
    caption = file.stem
    for prefix, words in CAPTIONS.items():
        caption = re.sub(f"^{prefix}", words, caption)
    return Picture(caption.replace("_", " "), _url(data), width < 480)


def _url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


class _Drawn(NamedTuple):
    """Pictures of a step: `samples`, `original`, `given`, `completions`. Equal `settings` make them comparable."""
    run: str
    step: int
    label: str
    settings: tuple
    pictures: Mapping[str, np.ndarray]


def strips(runs: Sequence[Run]) -> list[Strips]:
    """Samples, and completions of the same pictures, of each training run, over the steps that were sampled."""
    files = [(run, file) for run in runs if run.job in ("sample", "evaluate")
             for file in (run.folder / "samples.npz", *(run.folder / "samples").glob("*.npz")) if file.exists()]
    drawn = [whole(run, f"file {file.name}", None, _drawn, run, file) for run, file in files]
    groups: dict[tuple, list[_Drawn]] = {}
    for each in sorted(filter(None, drawn), key=lambda each: each.step or math.inf):
        groups.setdefault((each.run, *each.settings), []).append(each)
    found = []
    for (run, *_), steps in groups.items():
        steps = spaced(list({each.step: each for each in steps}.values()), STEPS_SHOWN)
        for kind in SHOWN:
            rows = [_strip(each.label, each.pictures[kind]) for each in steps if kind in each.pictures]
            if kind == "completions" and rows:
                rows = [_strip(name, steps[-1].pictures[name]) for name in ("original", "given")] + rows
            if rows:
                found.append(Strips(kind.capitalize(), run, rows, len(steps)))
    return sorted(found, key=lambda each: -each.steps)


def newest_completions(strips: Sequence[Strips]) -> list[Picture]:
    """Of the run with most steps: the original, the given and the completed pictures of the newest one."""
    rows = next((each.rows for each in strips if each.title == "Completions"), [])
    return rows[:2] + [row._replace(label="completed") for row in rows[-1:]]


def _drawn(run: Run, file: storage.Path) -> _Drawn:
    """What samples.npz of a sample job, or a file of `evaluate` with samples, holds."""
    with np.load(io.BytesIO(storage.read(file))) as arrays:
        arrays = dict(arrays)
    codec, shown = codec_of(str(arrays.get("codec", "palette")), arrays["palette"]), {}
    if "samples" in arrays:
        shown["samples"] = codec.decode(arrays["samples"][:SHOWN["samples"]])
    if "completions" in arrays:
        count = SHOWN["completions"]
        shown["original"] = codec.decode(arrays["originals"][:count])
        shown["completions"] = codec.decode(arrays["completions"][:count, 0])
        given = run.values.get("rows", -1)
        shown["given"] = shown["original"].copy()
        shown["given"][:, shown["given"].shape[1] // 2 if given < 0 else given:] = UNKNOWN
    given = storage.path(str(arrays["checkpoint"]) if "checkpoint" in arrays else run.values["checkpoint"])
    is_step = given.name.isdigit() and given.parent.name == "checkpoints"
    step = int(arrays.get("step") or run.metrics.get("step") or (given.name if is_step else 0))
    names = tuple(arrays["names"][:SHOWN["completions"]]) if "names" in arrays else ()
    settings = [run.values.get(name) for name in ("parameters", "rows", "temperature", "top_k", "top_p", "seed")]
    settings.append(arrays["originals"][:SHOWN["completions"]].tobytes() if "originals" in arrays else b"")
    return _Drawn(str(given.parent.parent if is_step else given), step, f"step {step:,}" if step else "newest step",
                  (run.title if run.job == "evaluate" else "", names, *settings), shown)


def _strip(label: str, images_BYXC: np.ndarray) -> Picture:
    """Images side by side, each enlarged to about 64 pixels, with transparent gaps."""
    scale, png = max(1, 64 // images_BYXC.shape[1]), io.BytesIO()
    opaque_BYXC = np.pad(images_BYXC, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=255)
    large_BYXC = opaque_BYXC.repeat(scale, axis=1).repeat(scale, axis=2)
    spaced_BYXC = np.pad(large_BYXC, ((0, 0), (0, 0), (0, GAP), (0, 0)))
    Image.fromarray(np.concatenate(spaced_BYXC, axis=1)[:, :-GAP]).save(png, format="PNG")
    return Picture(label, _url(png.getvalue()))
