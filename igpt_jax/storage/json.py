"""JSON that a browser or another program can read: NaN and infinities are null."""

import json
from typing import Any


def parse_json(data: bytes) -> Any:
    """The value of a JSON text. Raises ValueError, also where it is nested too deeply."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def to_json(value: Any, indent: int | None = 2) -> str:
    """JSON text that ends with a newline. NaN and infinities, which JSON lacks, become null."""
    text = json.dumps(value, default=lambda scalar: scalar.item())  # scalars of NumPy and JAX
    # Python writes NaN and infinities as words that are not JSON. Reading them back is where they can be replaced.
    return json.dumps(json.loads(text, parse_constant=lambda name: None), indent=indent) + "\n"
