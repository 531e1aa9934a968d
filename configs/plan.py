"""Plans the paper's run of a size for a topology, without its devices.

    igpt plan --config=plan:model=igpt_xl,image_size=64 --workdir=runs/plan --config.topology=v5e:16x16

The paper's batch and steps (Section 3.4): 128 images and 1M steps; 64 and 2M for iGPT-XL. Where no mesh is set, plan
takes the one that it estimates to be the fastest; --config.search=true compiles the best few.
"""

from igpt_jax.config import base_config, override


def get_config(arguments: str = ""):
    config = base_config("plan", arguments)
    if config.model.name == "igpt_xl":
        config.batch_size = 64
        config.steps = 2_000_000
    if config.model.name in ("igpt_l", "igpt_xl"):
        config.model.remat = "full"
    return override(config, arguments)
