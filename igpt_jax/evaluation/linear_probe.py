"""Linear probes: multinomial logistic regression on features, solved on the devices (paper, Section 2.4).

E examples, D features, K classes, R penalties or learning rates that are solved together.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

MEMORY = 20  # steps whose differences L-BFGS keeps to approximate the Hessian
STEPS = 1000  # at most, of L-BFGS
STALL, PATIENCE = 1e-7, 10  # L-BFGS stops after PATIENCE steps without a relative improvement of STALL


@dataclasses.dataclass(frozen=True)
class Probe:
    """A linear classifier of standardized features: logits = (x - mean) / deviation @ weights + biases."""
    mean_D: np.ndarray
    deviation_D: np.ndarray
    weights_DK: np.ndarray
    biases_K: np.ndarray

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Classes int [...] of features [..., D]."""
        return self.logits(features).argmax(axis=-1)

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Logits [..., K] of features [..., D]."""
        return (features - self.mean_D) / self.deviation_D @ self.weights_DK + self.biases_K

    def accuracy(self, features_ED: np.ndarray, labels_E: np.ndarray) -> float:
        """The fraction of examples that are classified correctly."""
        return float((self.predict(features_ED) == labels_E).mean())


def fit(features_ED: np.ndarray, labels_E: np.ndarray, classes: int, l2_R: Sequence[float],
        tolerance: float = 1e-6) -> list[Probe]:
    """Fits one probe per penalty. All are solved together, so that they share each pass over the features.

    Minimizes mean cross entropy + l2 / 2 * |weights|^2, without a penalty on the biases. This is scikit-learn's
    LogisticRegression with C = 1 / (l2 E), on features of mean 0 and deviation 1.

    Args:
      features_ED: float32; constant features are left at 0.
      labels_E: int, in [0, classes).
      classes: K.
      l2_R: penalties, > 0.
      tolerance: stops when the gradient's norm falls below this fraction of its first value.
    """
    mean_D, deviation_D = _standards(features_ED)
    x_ED = jnp.asarray((features_ED - mean_D) / deviation_D, jnp.float32)
    with jax.default_matmul_precision("highest"):  # whatever the precision of the features
        weights_RDK, biases_RK = _solve(x_ED, jnp.asarray(labels_E, jnp.int32), jnp.asarray(l2_R, jnp.float32),
                                        tolerance, classes)
    return _probes(mean_D, deviation_D, weights_RDK, biases_RK)


def _standards(features_ED: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each feature, float64; a constant one gets deviation 1."""
    mean_D, deviation_D = (each(features_ED, axis=0, dtype=np.float64) for each in (np.mean, np.std))
    return mean_D, np.where(deviation_D > 1e-6 * np.abs(mean_D), deviation_D, 1.0)


def _probes(mean_D: np.ndarray, deviation_D: np.ndarray, weights_RDK: jax.Array, biases_RK: jax.Array) -> list[Probe]:
    return [Probe(mean_D.astype(np.float32), deviation_D.astype(np.float32), weights_DK, biases_K)
            for weights_DK, biases_K in zip(np.asarray(weights_RDK), np.asarray(biases_RK), strict=True)]


@functools.partial(jax.jit, static_argnums=4)
def _solve(x_ED: jax.Array, labels_E: jax.Array, l2_R: jax.Array, tolerance: float, K: int
           ) -> tuple[jax.Array, jax.Array]:
    """Weights [R, D, K] and biases [R, K] by preconditioned L-BFGS.

    At zero weights the Hessian is a multiple of x'x/E + K l2. With p its inverse square root, weights = p u, so that u
    has curvature near 1 in all directions. L-BFGS on u takes a few dozen steps instead of hundreds.
    """
    E, D = x_ED.shape
    # One eigendecomposition serves all penalties, because a penalty only adds to the eigenvalues.
    gram_DD = jnp.dot(x_ED.T, x_ED, precision="highest") / E
    values_D, vectors_DD = jnp.linalg.eigh(gram_DD)
    onehot_EK = jax.nn.one_hot(labels_E, K, dtype=x_ED.dtype)

    def solve(l2: jax.Array) -> tuple[jax.Array, jax.Array]:
        # At zero weights each class has the probability 1 / K, so the curvature along an eigenvector is about its value
        # / K, and the penalty adds l2. Rounding can make a value slightly negative.
        scale_D = jax.lax.rsqrt((jnp.maximum(values_D, 0) + K * l2) / K)

        def weights(u_DK: jax.Array) -> jax.Array:
            return vectors_DD @ (scale_D[:, None] * u_DK)

        def loss(at: dict[str, jax.Array]) -> jax.Array:
            w_DK = weights(at["u"])
            logits_EK = x_ED @ w_DK + at["biases"] * math.sqrt(K)  # the curvature of a bias is 1 / K
            entropy = (jax.nn.logsumexp(logits_EK, axis=1) - (logits_EK * onehot_EK).sum(1)).mean()
            return entropy + 0.5 * l2 * jnp.square(w_DK).sum()

        at = _minimize(loss, {"u": jnp.zeros((D, K), x_ED.dtype), "biases": jnp.zeros(K, x_ED.dtype)}, tolerance)
        return weights(at["u"]), at["biases"] * math.sqrt(K)

    # All penalties share one loop, so each pass over the features serves all of them. It ends when the last one is
    # done.
    return jax.vmap(solve)(l2_R)


def _minimize(loss, start, tolerance):
    """Minimizes a convex function by L-BFGS, until the gradient's norm is `tolerance` times its first value.

    It also stops after PATIENCE steps in which the value fell by less than a fraction STALL: near the minimum, float32
    shows no difference any more, and each line search is wasted.
    """
    solver = optax.lbfgs(memory_size=MEMORY)
    value_and_grad = optax.value_and_grad_from_state(loss)
    first = optax.tree.norm(jax.grad(loss)(start))

    def unfinished(carry):
        _, state, index, _, since = carry
        gradient = optax.tree.norm(optax.tree.get(state, "grad"))
        return (index == 0) | (index < STEPS) & (gradient > tolerance * first) & (index - since <= PATIENCE)

    def step(carry):
        at, state, index, mark, since = carry
        value, gradient = value_and_grad(at, state=state)
        updates, state = solver.update(gradient, state, at, value=value, grad=gradient, value_fn=loss)
        fell = value < mark * (1 - STALL)
        return (optax.apply_updates(at, updates), state, index + 1, jnp.where(fell, value, mark),
                jnp.where(fell, index, since))

    return jax.lax.while_loop(unfinished, step, (start, solver.init(start), 0, jnp.inf, 0))[0]


def fit_sgd(features_ED: np.ndarray, labels_E: np.ndarray, classes: int, rates_R: Sequence[float],
            batches: Iterable[np.ndarray], steps: int) -> list[Probe]:
    """Fits one probe per learning rate by SGD with momentum 0.9 and a cosine schedule to 0 (paper, Section 3.4).

    All learning rates see the same batches, and there is no penalty. It is meant for datasets of ImageNet's size:
    `features_ED` may be a memory-mapped file, of which each step reads one batch.

    Args:
      features_ED, labels_E, classes: as in `fit`; mean and deviation are those of at most 50,000 examples.
      rates_R: initial learning rates.
      batches: ids of the examples of each step.
      steps: number of batches.
    """
    # Evenly spaced, because the first examples of a set may all be of one class.
    sample = np.linspace(0, len(features_ED) - 1, min(len(features_ED), 50_000)).astype(int)
    mean_D, deviation_D = _standards(features_ED[sample])
    rates = jnp.asarray(rates_R, jnp.float32)
    shape = (len(rates), features_ED.shape[1], classes)
    params = {"weights": jnp.zeros(shape), "biases": jnp.zeros((len(rates), classes))}

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, velocity, index, x_ED, labels_E):
        def loss(params):
            logits_REK = jnp.einsum("ED,RDK->REK", x_ED, params["weights"]) + params["biases"][:, None]
            # Summed over R: each probe's gradient depends on its own weights alone, so one backward pass serves all of
            # them.
            return optax.softmax_cross_entropy_with_integer_labels(logits_REK, labels_E[None]).mean(1).sum()

        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, jax.grad(loss)(params))
        rate_R = rates * 0.5 * (1 + jnp.cos(jnp.pi * index / steps))
        move = jax.tree.map(lambda p, v: p - rate_R.reshape(-1, *[1] * (p.ndim - 1)) * v, params, velocity)
        return move, velocity

    velocity = jax.tree.map(jnp.zeros_like, params)
    for index, ids in enumerate(batches):
        ids = np.sort(ids)  # a mapped file is read faster in order
        x_ED = ((features_ED[ids] - mean_D) / deviation_D).astype(np.float32)
        with jax.default_matmul_precision("highest"):  # whatever the precision of the features
            params, velocity = step(params, velocity, jnp.float32(index), x_ED, labels_E[ids].astype(np.int32))
    return _probes(mean_D, deviation_D, params["weights"], params["biases"])


def wilson(correct: float, total: int) -> tuple[float, float]:
    """The 95 % confidence interval of an accuracy `correct` (a fraction) over `total` examples (Wilson 1927)."""
    z = 1.959964
    middle = correct + z * z / (2 * total)
    spread = z * math.sqrt(correct * (1 - correct) / total + (z / (2 * total)) ** 2)
    return (middle - spread) / (1 + z * z / total), (middle + spread) / (1 + z * z / total)
