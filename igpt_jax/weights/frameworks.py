"""Workarounds for TensorFlow, torch and transformers: import order, availability, and versions with known errors."""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import math
import sys


def triton_first() -> None:
    """Imports triton if torch may use it later. Call it before importing TensorFlow in a process that may need both.

    Both bring an LLVM. With TensorFlow's there first, importing triton ends the process without a word that helps (exit
    code 134 or 139; tensorflow-cpu 2.21 with triton 3.7 and 3.9). Torch's builds for GPUs bring triton, and
    transformers' models import it: torch alone does not, so that importing torch first is not enough.
    """
    if "tensorflow" not in sys.modules and all(map(importlib.util.find_spec, ("torch", "triton"))):
        with contextlib.suppress(ImportError):
            importlib.import_module("triton")


def has_transformers() -> bool:
    """Whether transformers can compute here: it and torch are installed, and triton does not come too late."""
    too_late = "tensorflow" in sys.modules and "triton" not in sys.modules and importlib.util.find_spec("triton")
    return not too_late and all(map(importlib.util.find_spec, ("torch", "transformers")))


def fault_of_transformers(head_dim: int) -> str:
    """What the installed transformers computes wrongly for this head dim, and the fix; empty: nothing known."""
    try:
        version = importlib.metadata.version("transformers")
        release = tuple(map(int, version.split(".")[:2]))
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return ""
    if math.isqrt(head_dim) ** 2 == head_dim or not (5, 17) <= release < (5, 21):
        return ""
    return (f"transformers {version} divides attention scores by {math.isqrt(head_dim)} in place of the square root of "
            f"the head dim {head_dim}, an error of its versions 5.17 to 5.20. Run `pip install 'transformers>=5.22'` "
            "and convert again")
