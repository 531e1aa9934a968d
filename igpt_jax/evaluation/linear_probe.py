"""Linear probes: multinomial logistic regression on features, solved on the devices (paper, Section 2.4).

E examples, D features, K classes, R strengths of the penalty.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

MEMORY = 20  # pairs of differences that L-BFGS keeps
STEPS = 1000  # of L-BFGS, at most
STALL, PATIENCE = 1e-7, 10


@dataclasses.dataclass(frozen=True)
class Probe:
    """A linear classifier of standardized features: logits = (x - mean) / deviation @ weights + biases."""
    mean_D: np.ndarray
    deviation_D: np.ndarray
    weights_DK: np.ndarray
    biases_K: np.ndarray

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Classes int [...] of features [..., D]."""
        logits = (features - self.mean_D) / self.deviation_D @ self.weights_DK + self.biases_K
        return logits.argmax(axis=-1)

    def accuracy(self, features_ED: np.ndarray, labels_E: np.ndarray) -> float:
        return float((self.predict(features_ED) == labels_E).mean())


def fit(features_ED: np.ndarray, labels_E: np.ndarray, classes: int, strengths_R: Sequence[float],
        tolerance: float = 1e-6) -> list[Probe]:
    """One probe per strength, all solved at once: they share each reading of the features.

    Minimises mean cross entropy + strength / 2 * |weights|^2, biases free: scikit-learn's LogisticRegression with
    C = 1 / (strength E), on features of mean 0 and deviation 1.

    Args:
      features_ED: float32; constant features are left at 0.
      labels_E: int, each of [0, classes).
      classes: K.
      strengths_R: penalties, > 0.
      tolerance: of the gradient's norm, as a share of that at the start.
    """
    mean_D, deviation_D = _standards(features_ED)
    x_ED = jnp.asarray((features_ED - mean_D) / deviation_D, jnp.float32)
    weights_RDK, biases_RK = _solve(x_ED, jnp.asarray(labels_E, jnp.int32), jnp.asarray(strengths_R, jnp.float32),
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
def _solve(x_ED: jax.Array, labels_E: jax.Array, strengths_R: jax.Array, tolerance: float, K: int
           ) -> tuple[jax.Array, jax.Array]:
    """Weights [R, D, K] and biases [R, K] by L-BFGS in coordinates where the problem is nearly round.

    At zero weights the Hessian is a multiple of x'x/E + K strength. Weights are written as p u with p its inverse root:
    then u has curvature near 1 in all directions, and L-BFGS needs a few dozen steps where it took hundreds.
    """
    E, D = x_ED.shape
    gram_DD = jnp.dot(x_ED.T, x_ED, precision="highest") / E
    values_D, vectors_DD = jnp.linalg.eigh(gram_DD)
    onehot_EK = jax.nn.one_hot(labels_E, K, dtype=x_ED.dtype)

    def solve(strength: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale_D = jax.lax.rsqrt((jnp.maximum(values_D, 0) + K * strength) / K)

        def weights(u_DK: jax.Array) -> jax.Array:
            return vectors_DD @ (scale_D[:, None] * u_DK)

        def loss(at: dict[str, jax.Array]) -> jax.Array:
            w_DK = weights(at["u"])
            logits_EK = x_ED @ w_DK + at["biases"] * math.sqrt(K)
            entropy = (jax.nn.logsumexp(logits_EK, axis=1) - (logits_EK * onehot_EK).sum(1)).mean()
            return entropy + 0.5 * strength * jnp.square(w_DK).sum()

        at = _minimise(loss, {"u": jnp.zeros((D, K), x_ED.dtype), "biases": jnp.zeros(K, x_ED.dtype)}, tolerance)
        return weights(at["u"]), at["biases"] * math.sqrt(K)

    return jax.vmap(solve)(strengths_R)


def _minimise(loss, start, tolerance):
    """The minimum of a convex function by L-BFGS, to a gradient of `tolerance` times the first one.

    It also ends where the value has fallen by less than a share of STALL in the last PATIENCE steps: near the minimum
    float32 sees no difference any more, and line searches only cost.
    """
    solver = optax.lbfgs(memory_size=MEMORY)
    value_and_grad = optax.value_and_grad_from_state(loss)
    first = optax.tree.norm(jax.grad(loss)(start))

    def going(carry):
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

    return jax.lax.while_loop(going, step, (start, solver.init(start), 0, jnp.inf, 0))[0]


def fit_sgd(features_ED: np.ndarray, labels_E: np.ndarray, classes: int, rates_R: Sequence[float],
            batches: Iterable[np.ndarray], steps: int) -> list[Probe]:
    """One probe per learning rate by SGD with momentum 0.9 and a cosine to 0 (paper, Section 3.4), on the same batches.

    For sets of ImageNet's size: `features_ED` may be a mapped file, of which each step reads a batch. No penalty.

    Args:
      features_ED, labels_E, classes: as in `fit`; the mean and deviation are those of at most 50,000 examples.
      rates_R: initial learning rates.
      batches: ids of the examples of each step.
      steps: their number.
    """
    sample = np.linspace(0, len(features_ED) - 1, min(len(features_ED), 50_000)).astype(int)
    mean_D, deviation_D = _standards(features_ED[sample])
    rates = jnp.asarray(rates_R, jnp.float32)
    shape = (len(rates), features_ED.shape[1], classes)
    params = {"weights": jnp.zeros(shape), "biases": jnp.zeros((len(rates), classes))}

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, velocity, index, x_ED, labels_E):
        def loss(params):
            logits_REK = jnp.einsum("ED,RDK->REK", x_ED, params["weights"]) + params["biases"][:, None]
            return optax.softmax_cross_entropy_with_integer_labels(logits_REK, labels_E[None]).mean(1).sum()

        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, jax.grad(loss)(params))
        rate_R = rates * 0.5 * (1 + jnp.cos(jnp.pi * index / steps))
        move = jax.tree.map(lambda p, v: p - rate_R.reshape(-1, *[1] * (p.ndim - 1)) * v, params, velocity)
        return move, velocity

    velocity = jax.tree.map(jnp.zeros_like, params)
    for index, ids in enumerate(batches):
        ids = np.sort(ids)  # mapped files read forwards
        x_ED = ((features_ED[ids] - mean_D) / deviation_D).astype(np.float32)
        params, velocity = step(params, velocity, jnp.float32(index), x_ED, labels_E[ids].astype(np.int32))
    return _probes(mean_D, deviation_D, params["weights"], params["biases"])


def wilson(correct: float, total: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy of `correct` (a share) over `total` examples (Wilson 1927)."""
    z = 1.959964
    middle = correct + z * z / (2 * total)
    spread = z * math.sqrt(correct * (1 - correct) / total + (z / (2 * total)) ** 2)
    return (middle - spread) / (1 + z * z / total), (middle + spread) / (1 + z * z / total)
