"""Classification by the k nearest neighbors among the training features. Nothing is trained; only k is chosen.

The protocol of DINO (Caron et al. 2021, eval_knn.py), after Wu et al. 2018 (Section 3.4): cosine similarity, and each
neighbor votes for its class with the weight exp(similarity / 0.07).

E training examples, Q queries, D features, N neighbors, K classes, R numbers of neighbors.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

NEIGHBORS = (10, 20, 100, 200)  # to choose from (DINO)
TEMPERATURE = 0.07
AT_ONCE = 2**24  # similarities, 64 MiB


def neighbors_for(examples: int) -> tuple[int, ...]:
    """The numbers of neighbors to try among so many training examples."""
    return tuple(count for count in NEIGHBORS if count <= examples) or (examples,)


def predict(features_ED: np.ndarray, labels_E: np.ndarray, queries_QD: np.ndarray, classes: int,
            neighbors_R: Sequence[int]) -> np.ndarray:
    """Classes int [R, Q] of the queries, for each number of neighbors.

    Args:
      features_ED, labels_E: the training examples; labels in [0, classes).
      queries_QD: to classify.
      classes: K.
      neighbors_R: at most E each. All share one search.
    """
    unit_ED, labels_E = jnp.asarray(_unit(features_ED)), jnp.asarray(labels_E, jnp.int32)
    rows = max(1, AT_ONCE // len(features_ED))
    blocks = [_vote(unit_ED, labels_E, _unit(queries_QD[start:start + rows]), classes, tuple(neighbors_R))
              for start in range(0, len(queries_QD), rows)]
    return np.concatenate([np.asarray(each) for each in blocks], axis=1)


def _unit(features: np.ndarray) -> np.ndarray:
    """Features [..., D] of length 1; zeros stay zeros."""
    return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _vote(unit_ED: jax.Array, labels_E: jax.Array, queries_QD: jax.Array, K: int, neighbors_R: tuple[int, ...]
          ) -> jax.Array:
    similarity_QE = jnp.dot(queries_QD, unit_ED.T, precision="highest")
    similarity_QN, nearest_QN = jax.lax.top_k(similarity_QE, max(neighbors_R))  # the most similar first
    votes_QNK = jnp.exp(similarity_QN / TEMPERATURE)[..., None] * jax.nn.one_hot(labels_E[nearest_QN], K)
    return jnp.stack([votes_QNK[:, :count].sum(axis=1).argmax(axis=1) for count in neighbors_R])
