"""Options of XLA's compiler: the table by chip, the key `compiler_options`, and the programs that are compiled so."""

import jax
import jax.numpy as jnp
import pytest

from igpt_jax.config import MeshConfig, UserError, base_config, parse
from igpt_jax.config.keys import compiler_options_of, compiler_options_text
from igpt_jax.evaluation.exact_loss import jit_over_batches
from igpt_jax.evaluation.steps import make_eval_step
from igpt_jax.model.image_gpt import Model
from igpt_jax.parallel import compiler_options, sharding
from igpt_jax.parallel.topology import CHIPS
from igpt_jax.training.steps import abstract_state, jit_train_step


def test_text_and_options():
    text = "xla_a=true xla_b=3 xla_c=0.5 xla_d=x=y"
    assert compiler_options_of(f"--{text}") == {"xla_a": True, "xla_b": 3, "xla_c": 0.5, "xla_d": "x=y"}
    assert compiler_options_text(compiler_options_of(text)) == text
    for wrong in ("xla_a", "xla_a=", "=3"):
        with pytest.raises(UserError, match="must have the form NAME=VALUE"):
            parse("pretrain", base_config("pretrain", f"compiler_options={wrong}"))


def test_the_table_adds_to_what_is_given(monkeypatch, caplog):
    """Seen to fail with `none` ignored, and with the table winning over the key."""
    assert set(compiler_options.OPTIONS) <= {chip.name for chip in CHIPS}
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    ours = {"xla_cpu_enable_fast_min_max": True, "xla_made_up": 1, "xla_backend_optimization_level": 2}
    monkeypatch.setattr(compiler_options, "OPTIONS", {"": ours})
    given = "xla_backend_optimization_level=1"
    assert compiler_options.resolve(mesh, f"none {given}") == {"xla_backend_optimization_level": 1}
    with pytest.raises(UserError, match="refuses xla_typo: .*No such compile option"):
        compiler_options.resolve(mesh, "xla_typo=1")
    del ours["xla_cpu_enable_fast_min_max"]
    assert compiler_options.resolve(mesh, given) == {"xla_backend_optimization_level": 1}
    with pytest.raises(UserError, match="no SparseCore of a cpu can send"):
        compiler_options.resolve(mesh, "sparsecore")
    monkeypatch.setattr(compiler_options, "WITH_SPARSECORES", ("",))
    monkeypatch.setattr(compiler_options, "SPARSECORE", {"xla_cpu_enable_fast_min_max": False})
    assert compiler_options.resolve(mesh, f"none sparsecore {given}") == {
        "xla_cpu_enable_fast_min_max": False, "xla_backend_optimization_level": 1}
    assert "xla_made_up is not used" in caplog.text  # another version of the compiler may lack one of ours


def test_programs_are_compiled_with_the_options(tmp_path):
    """The compiler writes its dumps where the option says. Seen to fail with jits that do not pass the options."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    config = parse("pretrain", base_config("pretrain", "model=igpt_tiny,batch_size=2"))

    def model(folder):
        return Model(config.model, 16, 4, "float32", mesh, options=f"xla_dump_to={tmp_path / folder}")

    tokens_BT, ids_B = jax.ShapeDtypeStruct((2, 16), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    with jax.set_mesh(mesh):
        train, evaluate = model("train"), model("evaluate")
        state = abstract_state(train, config, mesh)
        key = jax.eval_shape(lambda: jax.random.key(0))
        jit_train_step(train, config, mesh, 1).lower(state, tokens_BT, key).compile()
        jit_over_batches(make_eval_step(evaluate), evaluate, mesh).lower(state["params"], tokens_BT, ids_B).compile()
    for name in ("train", "evaluate"):
        assert list((tmp_path / name).glob(f"*jit_{name if name == 'train' else 'eval'}_step*")), name
