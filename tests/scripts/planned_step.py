"""Compares the steps that `pretrain` and `plan` compile: python planned_step.py FOLDER OBJECTIVE.

Trains one step in FOLDER. Needs 4 devices.
"""

import sys

import jax

from igpt_jax.config import base_config, parse
from igpt_jax.jobs import prepare
from igpt_jax.parallel import sharding
from igpt_jax.planner import compilation
from igpt_jax.training import loop


def trained_step(folder, settings):
    """The text of the step that a run compiles."""
    images = parse("prepare", base_config("prepare", "source=synthetic:64,image_size=8,palette=fit:16"))
    prepare.run(images, f"{folder}/store")
    texts, jit_train_step = [], loop.jit_train_step

    class Spy:
        def __init__(self, *arguments):
            self.step = jit_train_step(*arguments)

        def lower(self, *shapes):
            lowered = self.step.lower(*shapes)
            texts.append(lowered.as_text())
            return lowered

    loop.jit_train_step = Spy
    config = base_config("pretrain", settings)
    config.data.store, config.data.held_out = f"{folder}/store", ""
    loop.train(parse("pretrain", config), f"{folder}/run")
    text, = texts
    return text


def planned_step(settings):
    """The text of the step that a plan compiles."""
    config = parse("plan", base_config("plan", settings + ",image_size=8,palette_size=16"))
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        step, shapes, _ = compilation.step_for(config, mesh)
        return step.lower(*shapes).as_text()


def main(folder, objective):
    settings = ("model=igpt_tiny,model.layers=2,batch_size=16,steps=1,optimizer.warmup_steps=1,mesh.fsdp=2,"
                f"mesh.tensor=2,accumulate=2,precision=bfloat16,eval_every_steps=0,objective={objective}")
    trained, planned = trained_step(folder, settings), planned_step(settings)
    differ = [pair for pair in zip(trained.splitlines(), planned.splitlines(), strict=False) if len(set(pair)) > 1]
    assert trained == planned, differ[:5]


if __name__ == "__main__":
    main(*sys.argv[1:])
