"""Config keys: unknown names, wrong types and values out of range are refused; resume rules; former names."""

import pytest
from ml_collections import ConfigDict

from igpt_jax.config import JOB_CONFIGS, MODELS, UserError, base_config, key_attributes, keys, parse, plain, to_dict


@pytest.mark.parametrize("job", JOB_CONFIGS)
def test_a_config_survives_its_json(job):
    """The dataclass comes back equal from config.json; every key has a help text.

    Seen to fail with tuples left as JSON's lists.
    """
    import json
    config = parse(job, base_config(job))
    assert parse(job, json.loads(json.dumps(to_dict(config)))) == config
    assert all(doc for _, _, doc in keys(job))


@pytest.mark.parametrize(("arguments", "message"), [
    ("stpes=3", "Did you mean 'steps'"), ("model=igpt_x", "Did you mean 'igpt_xl'"), ("steps", "must have the form"),
    ("steps=1.7", "must be of type int"), ("steps=True", "must be of type int"), ("steps=1e999", "must be of type int"),
    ("optimizer=3", "is a group"), ("model.mlp=-5", "model.mlp=-5"), ("model.layers=-1", "model.layers=-1"),
    ("seed=4294967296", "seed=4294967296"), ("seed=-1", "seed=-1"), ("model.heads=7", "model.heads=7"),
    ("optimizer.learning_rate=0", "must be positive"), ("precision=fp8", "precision='fp8'"), ("steps=0", "steps=0"),
    ("mesh.data=-1", "only one axis"), ("data.split=train+held_out", "also trained on"), ("job=evaluate", "evaluate"),
])
def test_refused(arguments, message):
    """Seen to fail with `int(literal)` instead of the type check."""
    with pytest.raises(UserError, match=message):
        parse("pretrain", base_config("pretrain", arguments))


@pytest.mark.parametrize(("job", "key", "value", "message"), [
    ("probe", "l2", ("a",), r"l2\[0\]='a' must be of type float"),
    ("probe", "l2", (1, float("inf")), r"l2\[1\]=inf must be finite"),
    ("probe", "rates", (None,), r"rates\[0\]=None must be of type float"),
    ("probe", "layers", (1.0,), r"layers\[0\]=1.0 must be of type int"),
    ("probe", "labels_per_class", (True,), r"labels_per_class\[0\]=True must be of type int"),
    ("evaluate", "probing", {"layers": [[1]]}, r"probing.layers\[0\]=\[1\] must be of type int"),
    ("pretrain", "accept_changes", (1,), r"accept_changes\[0\]=1 must be of type str"),
    ("pretrain", "optimizer", {"learning_rate": float("nan")}, "learning_rate=nan must be finite"),
    ("pretrain", "stall_seconds", 10**400, "must be of type float"),
    ("pretrain", "batch_size", 10**30, "must be below 2\\^63"),
    ("pretrain", "model", 3, "model=3 must be a group"),
])
def test_elements_and_infinities_are_refused(job, key, value, message):
    """Seen to fail without the check of a tuple's elements."""
    with pytest.raises(UserError, match=message):
        parse(job, {key: value})


@pytest.mark.parametrize(("job", "arguments", "message"), [
    ("probe", "l2=(0.5,),solver=sgd", r"l2=\(0.5,\) has no effect on solver=sgd"),
    ("probe", "rates=(1.0,)", r"rates=\(1.0,\) has no effect on solver=lbfgs. .* set solver=sgd"),
    ("probe", "steps=30,kind=knn", "steps=30 has no effect on solver=lbfgs"),
    ("probe", "draws=2", "draws=2 has no effect without labels_per_class"),
    ("evaluate", "probing.rates=(1.0,)", "has no effect on probing.solver=lbfgs"),
    ("evaluate", "poll_seconds=1", "poll_seconds=1.0 has no effect without watch"),
    ("sample", "images=mine,data.split=test", "data.split=test has no effect with images"),
    ("sample", "examples=0,data.store=s", "data.store=s has no effect with examples=0"),
    ("convert", "head=classes", "head=classes has no effect unless convert_to=huggingface:DIR"),
    ("convert", "export.rows=4,convert_to=openai:x", "export.rows=4 has no effect unless convert_to=export:DIR"),
    ("convert", "certificate=hashes,convert_to=export:x", "certificate=hashes has no effect on convert_to=export:DIR"),
])
def test_keys_without_effect_are_refused(job, arguments, message):
    """Seen to fail without each rule."""
    with pytest.raises(UserError, match=message):
        parse(job, base_config(job, arguments))


def test_keys_of_a_solver_that_other_probes_use_are_accepted():
    """Attention pooling takes steps, and low-data probes penalties. Seen to fail without `_used_by_others`."""
    parse("probe", base_config("probe", "steps=30,kind=attention"))
    parse("probe", base_config("probe", "l2=(0.5,),solver=sgd,labels_per_class=(4,)"))
    parse("convert", base_config("convert", "head=classes,certificate=hashes,convert_to=huggingface:x"))


@pytest.mark.parametrize("job", JOB_CONFIGS)
def test_no_key_takes_infinity_or_nan(job):
    for name in (name for name, default, _ in keys(job) if isinstance(default, float)):
        for value in ("inf", "-inf", "nan"):
            config = base_config(job)
            config.update_from_flattened_dict({name: float(value)})
            with pytest.raises(UserError, match=f"{name}={value} must be finite"):
                parse(job, config)


def test_values_of_every_kind():
    """Integers are accepted for floats; commas within a tuple do not split; None is not a value.

    Seen to fail with arguments split at every comma.
    """
    config = parse("pretrain", base_config("pretrain", "optimizer.learning_rate=1,keep_steps=(1,2),model=igpt_m"))
    assert (config.optimizer.learning_rate, config.keep_steps) == (1.0, (1, 2))
    assert (config.model.layers, config.model.embed, config.model.heads) == MODELS["igpt_m"]
    with pytest.raises(UserError, match="steps=None must be of type int"):
        parse("pretrain", ConfigDict({"steps": None}))


def test_former_names_of_keys_still_work():
    """On the command line, in a config file, in an old config.json and in a checkpoint's metadata.

    Seen to fail without the reference in `base_config`, and without `plain`.
    """
    for job, former, name, value in (("evaluate", "surprise", "loss_maps", 3),
                                     ("pretrain", "masked_share", "mask_ratio", 0.2),
                                     ("probe", "strengths", "l2", (0.5,))):
        arguments = f"objective=masked,{former}={value}" if job == "pretrain" else f"{former}={value}"
        assert getattr(parse(job, base_config(job, arguments)), name) == value
        config = base_config(job, "objective=masked" if job == "pretrain" else "")
        config[former] = value
        changed = base_config(job)
        changed.update(plain(job, config))
        assert getattr(parse(job, changed), name) == value
        old = {"job": job, former: value} | ({"objective": "masked"} if job == "pretrain" else {})
        assert getattr(parse(job, old), name) == value


def test_keys_that_a_resumed_run_may_change():
    """Some keys of each kind, of pretrain; also which keys decide a compiled step.

    Seen to fail with `steps` stated as free.
    """
    resume = key_attributes("pretrain", "resume")
    assert {name for name, how in resume.items() if how == "schedule"} == {
        "steps", "optimizer.schedule", "optimizer.decay_share", "optimizer.decay_shape"}
    assert {"data.store", "mesh.fsdp", "model.remat", "accumulate", "keep_steps"} <= {
        name for name, how in resume.items() if how == "free"}
    assert {"seed", "batch_size", "model.layers", "optimizer.beta2", "data.split", "objective", "precision"} <= {
        name for name, how in resume.items() if how == "same"}
    compiled = {name for name, depends in key_attributes("plan", "compiled").items() if depends}
    assert {"model.layers", "mesh.fsdp", "batch_size", "topology", "objective", "mask_ratio"} <= compiled
    assert not compiled & {"data.store", "seed", "steps", "search", "optimizer.learning_rate"}
