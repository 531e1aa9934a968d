"""Which size is best for a budget of FLOPs: from a fitted law, and from the profile of one budget's runs.

C is a budget in training FLOPs, N parameters, D tokens.
"""

import dataclasses

import numpy as np

from igpt_jax.scaling.law import Law


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs per token of a model with N parameters, k N^kappa, fitted to the sizes of a study.

    C = 6 N D of other studies is k = 6, kappa = 1. Attention and the head make small models of pixels cost more, which
    the exact count of `model.flops` includes.
    """
    k: float
    kappa: float

    @classmethod
    def of(cls, N: np.ndarray, flops_per_token: np.ndarray) -> "Cost":
        return cls(*power_law(N, flops_per_token))

    def tokens(self, C: np.ndarray, N: np.ndarray) -> np.ndarray:
        """D that a budget of C FLOPs pays for."""
        return C / (self.k * N**self.kappa)


def optimum(law: Law, cost: Cost, C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) of the lowest loss at a budget of C FLOPs. C must broadcast with the law's fields.

    With D = C / (k N^kappa), dL/dN = 0 has the solution
    N^(alpha + kappa beta) = alpha a N0^alpha (C / (k D0))^beta / (kappa beta b).
    """
    log_N = (np.log(law.alpha * law.a) + law.alpha * np.log(law.N0) + law.beta * np.log(C / (cost.k * law.D0))
             - np.log(cost.kappa * law.beta * law.b)) / (law.alpha + cost.kappa * law.beta)
    N = np.exp(log_N)
    return N, cost.tokens(C, N)


@dataclasses.dataclass(frozen=True)
class Profile:
    """The parabola curvature (log N - log N_best)^2 + best through the runs of one budget."""
    N: float
    best: float
    curvature: float

    def value(self, N: np.ndarray) -> np.ndarray:
        return self.curvature * (np.log(N) - np.log(self.N)) ** 2 + self.best


def profile(N: np.ndarray, values: np.ndarray, sign: int = 1) -> Profile | None:
    """The profile of one budget's runs, N [n] and a measure [n]; None without a best size between the smallest and the
    largest, or with fewer than three sizes. `sign` is 1 for losses, and -1 for measures of which more is better.

    Hoffmann et al. (arXiv 2203.15556), Approach 2. It is biased where the profile is not symmetric (arXiv 2603.22339).
    """
    if len(np.unique(N)) < 3:
        return None
    x = np.log(N)
    curvature, slope, constant = np.polyfit(x - x.mean(), values, 2)
    if sign * curvature <= 0:
        return None
    best = -slope / (2 * curvature)
    if not x.min() <= best + x.mean() <= x.max():
        return None
    return Profile(float(np.exp(best + x.mean())), float(constant - slope**2 / (4 * curvature)), float(curvature))


def power_law(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(factor, exponent) of y = factor x^exponent, by least squares of the logarithms."""
    exponent, log_factor = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(log_factor)), float(exponent)
