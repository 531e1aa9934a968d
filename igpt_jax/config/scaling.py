"""Keys of the scaling job."""

import dataclasses

from igpt_jax.config.evaluation import CompletionKeys, ProbingConfig
from igpt_jax.config.keys import at_least, each, key, positive, require, section, shard_syntax, slice_of
from igpt_jax.config.training import PretrainConfig


@dataclasses.dataclass(frozen=True)
class ScalingConfig(CompletionKeys):
    job: str = key("scaling", "the job that this configuration is for", resume="free")
    budgets: tuple[float, ...] = key((), "budgets of each run, training FLOPs, such as (1e13,3e13,1e14)",
                                     resume="free", rule=each(positive))
    held_out_budgets: tuple[float, ...] = key((), "budgets whose runs are not fitted but predicted, training FLOPs",
                                              resume="free", rule=each(positive))
    sizes: tuple[str, ...] = key((), "sizes: rows of the model table, or LAYERSxWIDTH, such as ('4x64','6x128')",
                                 resume="free")
    batch_size: int = key(0, "images per step of every run; 0: grows with a run's tokens (docs/scaling-studies.md)",
                          resume="free", rule=at_least(0))
    fewest_steps: int = key(300, "steps below which a run is shown but not fitted: its descent is still steep",
                            resume="free", rule=at_least(1))
    predict: tuple[float, ...] = key((), "further budgets to predict, training FLOPs", resume="free",
                                     rule=each(positive))
    probe: bool = key(False, "also probe each run, as the probe job does", resume="free")
    probing: ProbingConfig = section(ProbingConfig)
    shard: str = key("", "i/n: only slice i of n of the runs, from 0; merge: fit the runs of all slices; empty: all",
                     resume="free", rule=shard_syntax)
    pretrain: PretrainConfig = section(PretrainConfig)

    def __post_init__(self):
        super().__post_init__()
        require(len(set(self.all_budgets)) == len(self.budgets + self.held_out_budgets),
                "budgets and held_out_budgets name a budget twice. Name each once.")
        require(len(set(self.sizes)) == len(self.sizes), f"sizes={self.sizes} names a size twice. Name each once.")

    @property
    def all_budgets(self) -> tuple[float, ...]:
        return self.budgets + self.held_out_budgets

    @property
    def slice(self) -> tuple[int, int]:
        return slice_of(self.shard)
