"""What a study's runs say: profiles of each budget, the fitted law, the best size for a budget, and predictions."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from igpt_jax.config import UserError
from igpt_jax.config.evaluation import COMPLETION_MEASURES
from igpt_jax.scaling import frontier, law
from igpt_jax.scaling.study import COUNTS

# Steps x batch x tokens per image of the paper's models (Sections 3.3 and 3.4); XL was trained at 64x64.
PAPER_TOKENS: Mapping[str, float] = {"igpt_s": 1e6 * 128 * 1024, "igpt_m": 1e6 * 128 * 1024,
                                     "igpt_l": 1e6 * 128 * 1024, "igpt_xl": 2e6 * 64 * 4096}

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Fit:
    """A law of n runs with parameters counted in one way, its refits, and the FLOPs per token."""
    count: str  # a name of study.COUNTS
    measure: str  # the column that the law predicts
    n: int
    law: law.Law
    refits: law.Law
    cost: frontier.Cost

    @classmethod
    def of(cls, rows: Sequence[Row], count: str, measure: str = "nats_per_pixel") -> "Fit":
        """Raises UserError where the rows do not determine a law (see `law.fit`)."""
        N, D, loss, flops = (np.asarray([float(row[name]) for row in rows]) for name in (
            f"parameters_{count}", "tokens", measure, "flops"))
        found = law.fit(N, D, loss)
        return cls(count, measure, len(rows), found, law.bootstrap(found, N, D, loss), frontier.Cost.of(N, flops / D))

    def interval(self, values: np.ndarray) -> tuple[float, float]:
        return law.interval(values, self.n)

    @functools.cached_property
    def unidentified(self) -> str:
        """Why the runs do not determine the law; empty if they do."""
        if self.n < law.FEWEST_RUNS:
            return f"{self.n} runs are too few for intervals: use at least {law.FEWEST_RUNS}"
        for name, excess in (("alpha", self.law.a), ("beta", self.law.b)):
            low, high = self.interval(getattr(self.refits, name))
            if excess <= 0 or low <= law.RANGE[0] * 1.01 or high >= law.RANGE[1] * 0.99:
                axis = "sizes" if name == "alpha" else "numbers of tokens"
                return f"{name} is not determined (95 % interval {low:.2f} to {high:.2f}): use a wider range of {axis}"
        return ""

    def optimum(self, budget: float) -> dict[str, Any]:
        """The best size for a budget of FLOPs, with intervals."""
        found = {"budget": budget}
        for name, laws in (("", self.law), ("_interval", self.refits)):
            N, D = frontier.optimum(laws, self.cost, budget)
            values = {"parameters": N, "tokens": D, "tokens_per_parameter": D / N, self.measure: laws.loss(N, D)}
            found |= {key + name: self.interval(value) if name else float(value) for key, value in values.items()}
        return found

    def predicted(self, N: float, D: float) -> dict[str, Any]:
        """The measure of N parameters after D tokens, with its interval."""
        return {self.measure: float(self.law.loss(N, D)),
                f"{self.measure}_interval": self.interval(self.refits.loss(N, D))}

    def to_dict(self) -> dict[str, Any]:
        return {"counted": COUNTS[self.count], "runs": self.n, "flops_per_token": dataclasses.asdict(self.cost),
                "N0": self.law.N0, "D0": self.law.D0, "not_identified": self.unidentified,
                **{name: self._both(lambda laws, name=name: getattr(laws, name)) for name in law.FIELDS},
                "exponent_of_best_size": self._both(  # g of N_best proportional to C^g
                    lambda laws: laws.beta / (laws.alpha + self.cost.kappa * laws.beta))}

    def _both(self, figure: Callable[[law.Law], Any]) -> dict[str, Any]:
        """A figure of the law, and its interval."""
        return {"value": float(figure(self.law)), "interval": self.interval(figure(self.refits))}


def profiles(rows: Sequence[Row], count: str = "all", measure: str = "nats_per_pixel") -> dict[float, frontier.Profile]:
    """The profile of each budget that has a best size, by a measure of the rows."""
    sign = -1 if measure == "probe_accuracy" else 1
    found = {}
    for budget in sorted({row["budget"] for row in rows}):
        here = [row for row in rows if row["budget"] == budget and row.get(measure) is not None and not row["short"]]
        fitted = frontier.profile(np.asarray([row[f"parameters_{count}"] for row in here], float),
                                  np.asarray([row[measure] for row in here], float), sign)
        if fitted:
            found[budget] = fitted
    return found


def minima(rows: Sequence[Row], measure: str = "nats_per_pixel") -> list[dict[str, float]]:
    """The best size of each budget by its parabola."""
    found = []
    for budget, best in profiles(rows, measure=measure).items():
        N, flops = np.asarray([(row["parameters_all"], row["flops"] / row["tokens"])
                               for row in rows if row["budget"] == budget], float).T
        tokens = frontier.Cost.of(N, flops).tokens(budget, best.N)
        found.append({"budget": budget, "parameters": best.N, "tokens_per_parameter": tokens / best.N,
                      measure: best.best})
    return found


def analyze(rows: Sequence[Row], held_out: Sequence[float], predict: Sequence[float], sizes: Mapping[str, int]
            ) -> dict[str, Any]:
    """Everything that scaling.json's `metrics` and the report show.

    Args:
      rows: finished runs, with budget, flops, tokens, parameters_*, nats_per_pixel and, where probed, probe_accuracy.
        Those with `short` are left out.
      held_out: budgets that are not fitted, but predicted and compared.
      predict: further budgets.
      sizes: parameters of the paper's models, by name.
    """
    rows = [row for row in rows if not row["short"]]
    fitted = [row for row in rows if row["budget"] not in held_out]
    found: dict[str, Any] = {"runs_fitted": len(fitted), "profiles": minima(rows)}
    for measure in ("probe_accuracy", *COMPLETION_MEASURES):
        if best := minima(rows, measure):
            found["probe_profiles" if measure == "probe_accuracy" else "completion_profiles"] = best
    budgets = sorted({row["budget"] for row in rows} | set(predict))
    found |= _of_probe(fitted, budgets)
    try:
        fits = {count: Fit.of(fitted, count) for count in COUNTS}
    except UserError as error:
        return found | {"not_fitted": str(error)}
    found["laws"] = {count: fit.to_dict() for count, fit in fits.items()}
    fit = fits["all"]
    if fit.unidentified:
        return found | {"not_fitted": fit.unidentified}
    found["optima"] = {count: [each.optimum(budget) for budget in budgets] for count, each in fits.items()
                       if not each.unidentified}
    found["predictions"] = {name: {"tokens": PAPER_TOKENS[name], "parameters": N,
                                   **fit.predicted(N, PAPER_TOKENS[name])} for name, N in sizes.items()}
    found["held_out"] = [_compared(fit, row) for row in rows if row["budget"] in held_out]
    return found | {"sentence": sentence(found["optima"]["all"][-1], len(fitted))}


def _of_probe(rows: Sequence[Row], budgets: Sequence[float]) -> dict[str, Any]:
    """The law of the linear probe's error, 1 - accuracy, and the best sizes by it; empty without probes."""
    probed = [{**row, "probe_error": 1 - row["probe_accuracy"]} for row in rows
              if row.get("probe_accuracy") not in (None, 1.0)]  # the law has no error of 0
    if not probed:
        return {}
    try:
        fit = Fit.of(probed, "all", "probe_error")
    except UserError as error:
        return {"probe_not_fitted": str(error)}
    if fit.unidentified:
        return {"probe_law": fit.to_dict(), "probe_not_fitted": fit.unidentified}
    optima = [fit.optimum(budget) for budget in budgets]
    return {"probe_law": fit.to_dict(), "probe_optima": optima, "probe_sentence": sentence(optima[-1], fit.n)}


def _compared(fit: Fit, row: Row) -> dict[str, Any]:
    predicted = fit.predicted(row["parameters_all"], row["tokens"])
    return {"run": row["run"], **predicted, "measured": row["nats_per_pixel"],
            "error": predicted["nats_per_pixel"] / row["nats_per_pixel"] - 1}


def sentence(optimum: Mapping[str, Any], runs: int) -> str:
    """The answer in words, for the loss or for the probe."""
    goal, expected = (("", f"{optimum['nats_per_pixel']:.3f} nats per pixel") if "nats_per_pixel" in optimum else
                      ("the best linear probe at ", f"an accuracy of {100 * (1 - optimum['probe_error']):.1f} %"))
    N, (low, high) = optimum["parameters"], optimum["parameters_interval"]
    per, (fewest, most) = optimum["tokens_per_parameter"], optimum["tokens_per_parameter_interval"]
    return (f"For {goal}{optimum['budget']:.3g} FLOPs, train {short(N)} parameters ({short(low)} to {short(high)}) on "
            f"{short(optimum['tokens'])} tokens: {per:,.0f} tokens per parameter ({fewest:,.0f} to {most:,.0f}). "
            f"Expect {expected}. Fitted to {runs} runs; 95 % intervals.")


def short(number: float) -> str:
    """1.3M, 76M, 6.8B."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"
