"""The convert job: which files it replaces and which it never touches; weights that are not finite; run.py."""

import importlib.metadata
import json
import os
import pathlib
import runpy
import shutil
import sys
import types

import numpy as np
import pytest
from weights_files import change, float32, make_palette, run  # noqa: F401 (a fixture for all tests)

from igpt_jax import checkpoint
from igpt_jax.config import EvaluateConfig, ExportConfig, MeshConfig, SampleConfig, UserError
from igpt_jax.jobs import convert, evaluate, sample
from igpt_jax.parallel import sharding
from igpt_jax.runtime.exits import Ended
from igpt_jax.weights import frameworks, huggingface, names, open_weights, ours

KINDS = ("huggingface", "openai", "orbax")
ENTRY = {"huggingface": "config.json", "openai": "model.index", "orbax": "checkpoints/0/_CHECKPOINT_METADATA"}


def make_folder(folder):
    """A Hugging Face folder of a random model of 5x5 pixels and 13 colors, made without torch."""
    sizes, rng = {"L": 2, "D": 24, "N": 2, "H": 12, "F": 96, "V": 13, "T": 25}, np.random.default_rng(0)

    def layers(name):
        shape = [sizes[letter] for letter in name.rsplit("_", 1)[1]]
        stacked = any(part.ours == name and tensor.stacked for tensor in names.OPENAI for part in tensor.parts)
        return [(("norm" in name) + 0.3 * rng.normal(size=shape)).astype(np.float32)
                for _ in range(sizes["L"] if stacked else 1)]

    folder.mkdir(parents=True)
    palette_VC = np.linspace(1, -1, 39, dtype=np.float32).reshape(13, 3)
    huggingface.write(types.SimpleNamespace(sizes=sizes, layers=layers), folder, huggingface.PIXELS, palette_VC, 0.0)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("original") / "hf")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def converted(original, target, workdir="job", **more):
    """Converts with hashes alone, which programs do not have. Returns the certificate."""
    hashes = {} if target.startswith("export:") else {"certificate": "hashes"}
    return run(pathlib.Path(workdir), f"huggingface:{original}", target, **hashes, **more)[1]


def to(kind, folder="out"):
    return f"{kind}:{folder}/model" if kind == "openai" else f"{kind}:{folder}"


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_run_replaces_the_files_of_the_first(here, original, kind):
    """It touches no other file and leaves no temporary ones. Seen to fail with the target's folder removed."""
    first = converted(original, to(kind))
    before = content(here / "out")
    (here / "out" / "README.md").write_text("mine")
    (here / "out" / "more").mkdir()
    (here / "out" / "more" / "model.index").write_text("mine too")
    np.save("p.npy", np.linspace(-1, 1, 39, dtype=np.float32).reshape(13, 3))
    second = converted(original, to(kind), palette="p.npy")
    after = content(here / "out")
    assert after.keys() == before.keys() | {"README.md", "more/model.index"}
    assert after["README.md"] == b"mine" and after["more/model.index"] == b"mine too"
    assert first["files"].keys() == second["files"].keys() and second["verdict"] == "same"
    if kind != "openai":  # which has no palette
        assert any(after[name] != before[name] for name in before)


def test_later_steps_of_the_target_are_not_compared(here, original):
    """Seen to fail with the newest step of the folder compared: "not the same model"."""
    converted(original, "orbax:out")
    other = pathlib.Path(__file__).parent / "data" / "pretrain_format2" / "checkpoints" / "30"
    shutil.copytree(other, here / "out" / "checkpoints" / "30")
    assert converted(original, "orbax:out")["verdict"] == "same"


@pytest.mark.parametrize("kind", KINDS)
def test_a_relative_path_in_another_folder_is_another_target(here, original, kind, monkeypatch):
    """One workdir, `out` typed in two current folders: convert did not write the second `out`. Seen to fail with the
    typed paths compared."""
    converted(original, to(kind), workdir=here / "job")
    (here / "other").mkdir()
    monkeypatch.chdir(here / "other")
    path = here / "other" / "out" / ENTRY[kind]
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(UserError, match="is already there"):
        converted(original, to(kind), workdir=here / "job")
    assert content(here / "other") == {f"out/{ENTRY[kind]}": b"mine"}
    certificate = json.loads((here / "job" / convert.CERTIFICATE).read_text())
    assert certificate["verdict"] == "same" and certificate["place"].endswith(to(kind, f"{here}/out").partition(":")[2])
    monkeypatch.chdir(here / "out")
    converted(original, to(kind, "."), workdir=here / "job")  # the same target, spelled differently


@pytest.mark.parametrize("kind, name, what", [
    ("huggingface", "config.json", "has changed since"), ("huggingface", "model.safetensors", "has changed since"),
    ("openai", "model.data-00000-of-00001", "has changed since"),
    ("openai", "model.data-00000-of-00007", "is already there"),
    ("orbax", ENTRY["orbax"], "has changed since"), ("orbax", "checkpoints/0/README.md", "was not written by convert")])
def test_changed_files_and_files_of_the_user_stay(here, original, kind, name, what):
    """Seen to fail with files recognized by their names alone."""
    converted(original, to(kind))
    file = here / "out" / name
    file.write_bytes(b"edited" if not file.exists() else file.read_bytes() + b" ")
    before = content(here)
    with pytest.raises(UserError, match=f"{name} {what}") as caught:
        converted(original, to(kind))
    assert len(str(caught.value).splitlines()) == 1
    assert content(here) == before


@pytest.mark.parametrize("kind, name", [("huggingface", "hfé"), ("huggingface", "a 'b\" c"), ("orbax", "ü"),
                                        ("openai", "é"), ("huggingface", "~"), ("orbax", "none/../x"),
                                        ("huggingface", "none/../x")])
def test_any_name_is_recognized_by_the_next_run(here, original, kind, name, monkeypatch):
    """Seen to fail with names compared in their JSON spelling, and with `none/../x` opened while `none` is missing."""
    monkeypatch.setenv("HOME", str(here / "home"))
    for _ in range(2):
        assert converted(original, to(kind, name))["verdict"] == "same"


@pytest.mark.parametrize("target, what", [
    ("huggingface:.", "is already there"), ("huggingface:file", "is already there"),
    ("huggingface:file/x", "cannot be written"), ("orbax:file", "cannot be written"),
    ("openai:file/x", "cannot be written"), ("openai:one", "one/m.index is already there"),
    ("huggingface:gs://bucket/x", "a local folder"), ("openai:gs://bucket/x", "local files"),
    ("orbax:half", "is in the way"), ("export:job", "is already there")])
def test_unusable_targets_are_refused_in_one_line(here, original, target, what):
    """Nothing is written or lost. `one` holds another OpenAI checkpoint, `half` the unfinished files of another run."""
    for name in ("file", "one/m.index", "half/checkpoints/.0.unfinished/x", "job/config.json"):
        (here / name).parent.mkdir(exist_ok=True, parents=True)
        (here / name).write_text("mine")
    before = content(here)
    with pytest.raises(UserError, match=what) as caught:
        converted(original, target)
    assert len(str(caught.value).splitlines()) == 1
    assert content(here) == before


def test_leftovers_of_a_killed_run_are_removed(here, original, monkeypatch):
    """Killed while writing, and again while moving files. Seen to fail without the target's path in the certificate."""
    class Killed(BaseException):
        pass

    def killed(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(convert.huggingface, "write", killed)
        patch.setattr("igpt_jax.weights.target.Target._restore", killed)  # a killed process cleans up nothing
        patch.setattr("igpt_jax.weights.target.shutil.rmtree", lambda *arguments, **more: None)
        with pytest.raises(Killed):
            converted(original, "huggingface:out")
    assert list((here / "out").iterdir()) == [here / "out" / ".convert.unfinished"]
    converted(original, "huggingface:out")
    expected = content(here / "out")
    moved = []

    def replace(source, to):
        if len(moved) == 4:  # the three old files are moved away, and one new file is in place
            raise Killed
        moved.append(os.path.basename(to))
        os.replace(source, to)

    with monkeypatch.context() as patch:
        patch.setattr("igpt_jax.weights.target.os", types.SimpleNamespace(**{**vars(os), "replace": replace}))
        with pytest.raises(Killed):
            converted(original, "huggingface:out")
    assert moved[3] == "model.safetensors" and not (here / "out" / "config.json").exists()
    assert converted(original, "huggingface:out")["verdict"] == "same"
    assert content(here / "out") == expected


# Weights that are not finite.

def spoiled(folder, original, name="transformer.h.1.mlp.c_fc.weight", value=np.nan):
    """A copy of the model with one bad element."""
    folder.mkdir()
    for file in original.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder, lambda tensors: tensors[name].__setitem__((0, 0), value))
    return folder


def spoiled_checkpoint(workdir, original, value):
    """Our checkpoint with one bad element and correct checksums, as a diverged training would save it."""
    source = open_weights("huggingface", str(original))
    params = ours.parameters(source, lambda shape, name: np.empty(shape, np.float32))
    params["blocks"]["query_DNH"][1, 0, 0, 0] = value
    ours.save(str(workdir), params, ours.record_for(source, source.palette_VC))
    return workdir


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["huggingface", "orbax"])
def test_weights_that_are_not_finite_are_not_converted(here, original, kind, value):
    """One line names the tensor. The files and certificate of an earlier run are unchanged. Seen to fail without
    `finite`."""
    converted(original, "openai:out/model")
    before = content(here)
    if kind == "orbax":
        source = spoiled_checkpoint(here / "bad", original, value)
    else:
        source = spoiled(here / "bad", original, value=value)
    for target in ("openai:out/model", "huggingface:new", "orbax:new"):
        with pytest.raises(UserError, match="not finite .NaN or infinity in .*(query_DNH|c_fc.weight)") as caught:
            run(here / "job", f"{kind}:{source}", target, certificate="hashes")
        assert len(str(caught.value).splitlines()) == 1
    assert {name: data for name, data in content(here).items() if not name.startswith("bad")} == before


def test_jobs_refuse_a_checkpoint_that_is_not_finite(here, original, capsys):
    """`load_model` refuses it for all jobs. `evaluate` measures the other checkpoints and names this one. Seen to fail
    with a color drawn, and with a loss of NaN."""
    bad = spoiled_checkpoint(here / "bad", original, np.nan)
    converted(original, "orbax:good")
    with pytest.raises(UserError, match="not finite .NaN or infinity in blocks/query_DNH, 1 of 13 arrays"):
        checkpoint.load_model(str(bad), sharding.make_mesh(MeshConfig()), "bfloat16")
    with pytest.raises(UserError, match="not finite"):
        sample.run(SampleConfig(checkpoint=str(bad), count=1), "s")
    np.save("tokens.npy", np.zeros((2, 25), np.int64))
    with pytest.raises(Ended, match="not finite, and not in the table: bad/checkpoints/0") as ended:
        evaluate.run(EvaluateConfig(checkpoints="bad,good", tokens="tokens.npy", batch_size=2), "e")
    assert ended.value.metrics["checkpoints"] == 1 and "its weights are not finite" in capsys.readouterr().err


def test_overflowing_weights_have_a_message_of_their_own(here, original):
    """Finite weights, infinite logits, in convert and sample. Seen to fail with "not the same model", and with pictures
    of color 0."""
    bad = spoiled(here / "bad", original, "lm_head.weight", 3e38)
    change(bad, lambda tensors: tensors["lm_head.weight"].__setitem__(slice(None), 3e38))
    converted(bad, "openai:oa/model")
    with pytest.raises(UserError, match="so large that computing overflows"):
        run(here / "again", "openai:oa/model", "orbax:ours", palette=make_palette(here / "p.npy", 13))
    with pytest.raises(UserError, match="its logits are not finite"):
        sample.run(SampleConfig(checkpoint="ours", count=1), "s")


@pytest.mark.parametrize("version, named", [("5.17.0", True), ("5.20.2", True), ("5.21.0", False), ("5.16.1", False),
                                           ("4.57.6", False), ("6.0.0.dev0", False), ("odd", False)])
def test_a_library_that_computes_wrongly_is_named(here, original, version, named, monkeypatch):
    """If logits differ. Seen to fail with 5.21, whose `torch_float` is correct, among the wrong versions."""
    known = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version",
                        lambda name: version if name == "transformers" else known(name))
    monkeypatch.setattr(huggingface.HuggingFaceWeights, "outputs", lambda *_: {"pixels": np.zeros((2, 25, 13))})
    with pytest.raises(UserError) as caught:
        run(here / "job", f"huggingface:{original}", "orbax:ours")
    assert ("pip install 'transformers>=5.22'" in str(caught.value)) == named
    assert ("not the same model" in str(caught.value)) != named and len(str(caught.value).splitlines()) == 1


def test_a_processor_without_clusters_needs_a_palette(here, original):
    """With a palette given, an unusable processor file does not matter. Seen to fail with the file always read."""
    for text, what in (("{}", "comes without its palette"), ("no JSON", "is not JSON"),
                       ('{"clusters": [[2]]}', "must be 13 colors")):
        bad = here / f"bad{len(text)}"
        bad.mkdir()
        for file in original.iterdir():
            (bad / file.name).write_bytes(file.read_bytes())
        (bad / "preprocessor_config.json").write_text(text)
        with pytest.raises(UserError, match=what):
            converted(bad, "orbax:ours")
        assert converted(bad, "orbax:ours", palette=make_palette(here / "p.npy", 13))["verdict"] == "same"


FAKE = {"tensorflow": "import types; config = types.SimpleNamespace(set_visible_devices=lambda *_: None)",
        "torch": "", "triton": ""}


@pytest.mark.parametrize("installed, order", [
    (("torch", "triton"), ["triton", "tensorflow"]), (("torch",), ["tensorflow"]), (("triton",), ["tensorflow"])])
def test_triton_comes_before_tensorflow(tmp_path, python, installed, order):
    """In the opposite order the process crashes. Fake packages that print their import replace the real ones. Seen to
    fail without `triton_first`."""
    for name in ("tensorflow", *installed):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"print('importing', __name__)\n{FAKE[name]}\n")
    done = python(f"""
import sys
sys.path = [{str(tmp_path)!r}] + [p for p in sys.path]
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: (
    None if name in {sorted(set(FAKE) - set(installed) - {'tensorflow'})} else real(name, *more))
from igpt_jax.weights import openai
openai._tensorflow()
""", devices=1)
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("importing")] == order


def test_transformers_is_not_used_where_it_would_crash_the_process(monkeypatch):
    """TensorFlow is imported and triton is not. Seen to fail with a check of installed packages alone."""
    monkeypatch.setattr(frameworks.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "tensorflow", types.ModuleType("tensorflow"))
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    assert not frameworks.has_transformers()
    frameworks.triton_first()  # importing triton now would crash too
    assert "triton" not in sys.modules
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    assert frameworks.has_transformers()


# Exported programs.

@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    run(folder / "job", f"huggingface:{make_folder(folder / 'hf')}", f"export:{folder}/out",
        export=ExportConfig(rows=4, platforms=("cpu",)))
    return folder / "out"


@pytest.mark.parametrize("arguments, what", [
    ([], "number of pictures"), (["0", "x.npz"], "number of pictures"), (["-3", "x.npz"], "number of pictures"),
    (["1.5", "x.npz"], "number of pictures"), (["1", "none/x.npz"], "x.npz cannot be written"),
    (["1", "."], "cannot be written"), (["10" * 8, "x.npz"], "fails: "), (["1", "x.npz"], "sampler.jax cannot be read"),
    (["1", "x.npz"], "weights.npz cannot be read"), (["1", "x.npz"], "palette.npy cannot be read"),
    (["1", "x.npz"], "fails: "), (["1", "x.npz"], "logits are not finite")])
def test_an_exported_program_reports_mistakes_in_one_line(exported, tmp_path, arguments, what, monkeypatch, capsys):
    """Its exit code is 2. Seen to fail with tracebacks."""
    shutil.copytree(exported, tmp_path / "out")
    for name in ("sampler.jax", "weights.npz", "palette.npy"):
        if what.startswith(name):
            (tmp_path / "out" / name).write_bytes(b"damaged")
    if arguments == ["1", "x.npz"] and what in ("fails: ", "logits are not finite"):
        with np.load(exported / "weights.npz") as file:
            weights = {name: np.full_like(array, np.nan) for name, array in file.items()}
        if what == "fails: ":
            weights.pop("head_VD")
        np.savez(tmp_path / "out" / "weights.npz", **weights)
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(tmp_path / "out" / "run.py"))
    message = capsys.readouterr().err
    assert ended.value.code == 2 and len(message.splitlines()) == 1 and what in message
    assert not list(tmp_path.glob("*.npz"))
