"""JSON that a browser or another program can read: NaN and infinities are null."""

import json
from typing import Any


def parse_json(data: bytes) -> Any:
    """What JSON says. Raises ValueError, where it is nested too deeply too."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def to_json(value: Any, indent: int | None = 2) -> str:
    """JSON with what JSON has no word for, NaN and infinities, as null."""
    text = json.dumps(value, default=lambda scalar: scalar.item())  # NumPy's and JAX's scalars
    return json.dumps(json.loads(text, parse_constant=lambda name: None), indent=indent) + "\n"
