"""Fits L(N, D) = E + A N^-alpha + B D^-beta to the losses of many runs (Hoffmann et al., arXiv 2203.15556, Approach 3).

N is a number of parameters, D of tokens. The fit minimizes the Huber loss of log(predicted / measured).

Variable projection (Golub and Pereyra 1973) finds the minimum: for given exponents, the best E, A and B >= 0 follow
from linear least squares, so a search over two exponents is enough. It has no starting point to choose, unlike a search
over five coupled parameters, and it assumes no shape of the profile, unlike a parabola per budget (arXiv 2603.22339).

Legend: R refits, n runs, p = 5 parameters in the order of `Law`.
"""

import dataclasses
import itertools

import numpy as np
import scipy.stats

from igpt_jax.config import UserError

FIELDS = ("E", "a", "alpha", "b", "beta")
RANGE = (0.02, 2.0)  # of the exponents
HUBER = 0.03  # residuals of log loss above this count linearly, not squared
REFITS = 1000
FEWEST_RUNS = 8  # with 6 or 7 an interval ends at the extremes of the refits, far from 95 % (docs/scaling-studies.md)
_GRID, _REFINEMENTS = 24, 6  # the search over exponents: points per axis, and how often it zooms in


@dataclasses.dataclass(frozen=True)
class Law:
    """L(N, D) = E + a (N / N0)^-alpha + b (D / D0)^-beta, of nats per pixel or another measure.

    N0 and D0 are the runs' geometric means. With them, `a` and `b` are the two excess losses of a run in the middle.
    Fields are floats, or arrays [R] of the refits of a bootstrap.
    """
    E: np.ndarray
    a: np.ndarray
    alpha: np.ndarray
    b: np.ndarray
    beta: np.ndarray
    N0: float
    D0: float

    def loss(self, N: np.ndarray, D: np.ndarray) -> np.ndarray:
        """Predicted loss. N and D must broadcast with the fields."""
        return (self.E + self.a * np.exp(-self.alpha * np.log(N / self.N0))
                + self.b * np.exp(-self.beta * np.log(D / self.D0)))


def fit(N: np.ndarray, D: np.ndarray, loss: np.ndarray) -> Law:
    """The law of n runs with N [n] parameters, D [n] tokens and `loss` [n].

    Raises:
      UserError: fewer than six runs, fewer than three sizes or data sizes, or losses that are not positive.
    """
    N, D, loss = (np.asarray(values, np.float64) for values in (N, D, loss))
    if len(loss) < 6 or min(len(np.unique(N.round(6))), len(np.unique(D.round(6)))) < 3:
        raise UserError(f"{len(loss)} runs with {len(np.unique(N))} sizes and {len(np.unique(D))} numbers of tokens do "
                        "not determine the law's 5 parameters. Run at least 6, with 3 sizes and 3 numbers of tokens.")
    if not np.all(np.isfinite(loss) & (loss > 0)):
        raise UserError("A loss is not a positive number. Remove diverged runs from the fit.")
    x_n, x_D, log_loss = np.log(N / _middle(N)), np.log(D / _middle(D)), np.log(loss)
    low, high = (np.full(2, np.log(end)) for end in RANGE)
    for _ in range(_REFINEMENTS):
        axes = np.linspace(low, high, _GRID)  # [grid, 2]
        alpha, beta = np.meshgrid(*np.exp(axes.T), indexing="ij")
        coefficients, objective = _projected(alpha, beta, x_n, x_D, log_loss)
        best = np.unravel_index(objective.argmin(), objective.shape)
        center, half = axes[best, (0, 1)], 2 * (axes[1] - axes[0])
        low, high = np.maximum(center - half, np.log(RANGE[0])), np.minimum(center + half, np.log(RANGE[1]))
    E, a, b = coefficients[best]
    return Law(E, a, np.exp(center[0]), b, np.exp(center[1]), _middle(N), _middle(D))


def bootstrap(law: Law, N: np.ndarray, D: np.ndarray, loss: np.ndarray, seed: int = 0, refits: int = REFITS) -> Law:
    """Laws of `refits` samples of the runs, drawn with replacement. Each is refitted from `law` to its own minimum."""
    rng = np.random.default_rng(seed)
    n = len(loss)
    weights_Rn = rng.multinomial(n, np.full(n, 1 / n), refits).astype(np.float64)
    return _descended(law, weights_Rn, np.log(N / law.N0), np.log(D / law.D0), np.log(loss))


def interval(values: np.ndarray, n: int, p: int = 5, level: float = 0.95) -> tuple[float, float]:
    """The interval of a bootstrap's values [R], with n runs and p parameters.

    Plain percentiles are too narrow for few runs. These are expanded by sqrt(n / (n - p)) and Student's t (Hesterberg,
    "What Teachers Should Know About the Bootstrap", 2015, Section 4.2).
    """
    if n <= p:
        return -np.inf, np.inf
    wide = np.sqrt(n / (n - p)) * scipy.stats.t.ppf((1 + level) / 2, n - p)
    tail = scipy.stats.norm.cdf(-wide)
    low, high = np.quantile(values, (tail, 1 - tail))
    return float(low), float(high)


def _middle(values: np.ndarray) -> float:
    """The geometric mean."""
    return float(np.exp(np.log(values).mean()))


def _projected(alpha: np.ndarray, beta: np.ndarray, x_n: np.ndarray, x_D: np.ndarray, log_loss: np.ndarray
               ) -> tuple[np.ndarray, np.ndarray]:
    """The best (E, a, b) >= 0 [..., 3] for exponents [...], and their objective [...].

    log(predicted / measured) is linearized around the prediction, which starts at the measured losses. Each pass is
    least squares with the Huber loss's weights.
    """
    terms = np.stack([np.ones((*alpha.shape, len(x_n))), np.exp(-alpha[..., None] * x_n),
                      np.exp(-beta[..., None] * x_D)], -1)
    predicted = np.broadcast_to(np.exp(log_loss), terms.shape[:-1])
    weights = np.ones_like(predicted)
    for _ in range(4):
        scaled = terms / predicted[..., None]
        target = 1 + log_loss - np.log(predicted)
        coefficients = _nonnegative(scaled, weights, target)
        predicted = np.einsum("...ni,...i->...n", terms, coefficients)
        residual = np.log(predicted) - log_loss
        weights = _huber_weights(residual)
    return coefficients, _huber(residual).sum(-1)


def _nonnegative(scaled: np.ndarray, weights: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Weighted least squares with coefficients >= 0: the best of all choices of which coefficients are not 0."""
    weighted = scaled * weights[..., None]
    gram, right = (np.einsum("...ni,...nj->...ij", weighted, scaled), np.einsum("...ni,...n->...i", weighted, target))
    best, found = np.full(right.shape[:-1], np.inf), np.zeros_like(right)
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(3), k) for k in (3, 2, 1)):
        part = gram[..., chosen, :][..., chosen]
        scale = 1 / np.sqrt(np.einsum("...ii->...i", part))
        conditioned = part * scale[..., :, None] * scale[..., None, :] + 1e-13 * np.eye(len(chosen))
        values = scale * np.linalg.solve(conditioned, (right[..., chosen] * scale)[..., None])[..., 0]
        value = -np.einsum("...i,...i->...", values, right[..., chosen])
        better = (values >= 0).all(-1) & (value < best)
        best = np.where(better, value, best)
        full = np.zeros_like(right)
        full[..., chosen] = values
        found = np.where(better[..., None], full, found)
    return found


def _descended(law: Law, weights_Rn: np.ndarray, x_n: np.ndarray, x_D: np.ndarray, log_loss: np.ndarray) -> Law:
    """Levenberg-Marquardt from `law` on weighted runs, for R refits at once, in the logarithms of the parameters."""
    R = len(weights_Rn)
    theta = np.tile(np.log(np.maximum([getattr(law, name) for name in FIELDS], 1e-6)), (R, 1))
    damping = np.full(R, 1e-3)

    def terms(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Residuals [R, n] of log loss and their slopes [R, n, 5]."""
        E, a, alpha, b, beta = (np.exp(theta[:, i, None]) for i in range(5))
        of_n, of_D = a * np.exp(-alpha * x_n), b * np.exp(-beta * x_D)
        predicted = E + of_n + of_D
        slopes = np.stack([E + 0 * predicted, of_n, -of_n * alpha * x_n, of_D, -of_D * beta * x_D], -1)
        return np.log(predicted) - log_loss, slopes / predicted[..., None]

    residual, slopes = terms(theta)
    value = (weights_Rn * _huber(residual)).sum(-1)
    for _ in range(60):
        weights = weights_Rn * _huber_weights(residual)
        curvature = np.einsum("Rni,Rn,Rnj->Rij", slopes, weights, slopes)
        gradient = np.einsum("Rni,Rn->Ri", slopes, weights * residual)
        diagonal = np.einsum("Rii->Ri", curvature) + 1e-12
        damped = curvature + (damping[:, None] * diagonal)[..., None] * np.eye(5)
        step = np.linalg.solve(damped, gradient[..., None])[..., 0]
        tried = np.clip(theta - np.clip(step, -1, 1), -20, 5)
        tried[:, (2, 4)] = np.clip(tried[:, (2, 4)], *np.log(RANGE))
        new_residual, new_slopes = terms(tried)
        new_value = (weights_Rn * _huber(new_residual)).sum(-1)
        better = new_value <= value
        theta, value = np.where(better[:, None], tried, theta), np.where(better, new_value, value)
        residual, slopes = (np.where(better[:, None], new_residual, residual),
                            np.where(better[:, None, None], new_slopes, slopes))
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-9, 1e6)
    return Law(*np.exp(theta).T, law.N0, law.D0)


def _huber(residual: np.ndarray) -> np.ndarray:
    """The Huber loss of each residual."""
    size = np.abs(residual)
    return np.where(size <= HUBER, size**2 / 2, HUBER * (size - HUBER / 2))


def _huber_weights(residual: np.ndarray) -> np.ndarray:
    """The weights with which least squares has the Huber loss's gradient."""
    return np.minimum(1, HUBER / np.maximum(np.abs(residual), 1e-300))
