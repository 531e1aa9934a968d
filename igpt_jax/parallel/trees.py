"""The names of a tree's arrays."""

from typing import Any

import jax


def by_name(tree: Any) -> dict[str, Any]:
    """{"params/blocks/query_DNH": leaf} of a tree of dicts, tuples and optax's named tuples."""
    return {"/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
