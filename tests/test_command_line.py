"""The command line, and what `run_job` does around a job: records in the workdir, exit codes, signals."""

import json
import operator
import os
import re
import signal
import subprocess
import sys
import time
import types

import jax
import pytest
from conftest import ROOT, SCRIPTS, patience

import igpt_jax
from igpt_jax import command_line, process, storage
from igpt_jax.config import UserError, base_config, parse, to_dict
from igpt_jax.runtime import job as runtime
from igpt_jax.runtime import signals
from igpt_jax.runtime.exits import Diverged, Preempted
from igpt_jax.runtime.signals import StopSignal

CONFIG = """
from igpt_jax.config import base_config


def get_config(arguments=""):
    config = base_config("pretrain", arguments)
    {line}
    return config
"""


def test_job_list_is_fast(run_job):
    done = run_job(env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0
    assert not imports_jax(done), "the list of jobs must not wait for JAX"
    assert all(job in done.stdout for job in ("prepare", "pretrain", "evaluate", "sample"))


def test_help_lists_every_key_without_jax(run_job):
    done = run_job("pretrain", "--help", env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0
    assert "--config.optimizer.learning_rate=0.003" in done.stdout
    assert not imports_jax(done)


def imports_jax(done) -> bool:
    return re.search(r"\| +jax$", done.stderr, re.MULTILINE) is not None


def shell(command):
    """Runs a shell command in which `igpt` stands for `python -m igpt_jax`."""
    igpt = f'igpt() {{ {sys.executable} -m igpt_jax "$@"; }}'
    return subprocess.run(["bash", "-c", f"set -o pipefail; {igpt}; {command}"], text=True, capture_output=True,
                          timeout=patience(30), cwd=ROOT)


@pytest.mark.parametrize("command, code, stderr", [
    ("igpt --help | head -n 1", 0, ""),
    ("igpt pretrain --help | head -c 1", 0, ""),
    ("igpt --help > /dev/full", 0, "igpt_jax: stdout cannot be written: [Errno 28] No space left on device\n"),
    ("igpt pretran 2> /dev/full", 2, ""),
    ("igpt --help >&- 2>&- <&-", 0, ""),
    ("igpt pretran >&- 2>&-", 2, ""),
    ("PYTHONIOENCODING=ascii igpt 'pr\u00e9parer'", 2, "igpt_jax pr\\xe9parer: this job is not known. Did you mean "
                                                    "'prepare'?\n"),
])
def test_closed_and_full_streams(command, code, stderr):
    """Seen to fail with a plain `print`, and without `open_streams`."""
    done = shell(command)
    assert (done.returncode, done.stderr) == (code, stderr)


def test_a_file_never_gets_the_number_of_a_closed_stream():
    """Otherwise it would receive the output of C++ and subprocesses. Seen to fail without `open_streams`."""
    command = f"exec {sys.executable} {SCRIPTS / 'closed_streams.py'} >&- 2>&- <&-"
    assert subprocess.run(["bash", "-c", command], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("package, install", [("ml_collections", "ml_collections"),
                                              ("orbax.checkpoint", "orbax-checkpoint")])
def test_a_missing_package_is_one_line(package, install, tmp_path):
    """At the start, and once a job begins. Seen to fail without the branch of `__main__`."""
    done = subprocess.run([sys.executable, SCRIPTS / "missing_package.py", package], text=True, capture_output=True,
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    command = f"Run: pip install {install}, or everything that igpt_jax needs: pip install -e "
    assert f"is not installed. {command}" in done.stderr


@pytest.mark.parametrize("variable", ["JAX_ENABLE_X64", "JAX_DEFAULT_DEVICE", "JAX_DEFAULT_PRNG_IMPL"])
def test_a_variable_that_jax_refuses_is_one_line(run_job, variable):
    """Seen to fail with a plain import of JAX."""
    done = run_job("verify", "--workdir=w", env={variable: "word"})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and f"{variable}='word'" in done.stderr


def test_only_packages_that_are_not_installed_are_missing():
    """A missing module of ours, or of an installed package, is a bug and keeps its traceback."""
    def message(name, cause=None):
        error = ModuleNotFoundError("no", name=name)
        error.__cause__ = cause
        return process.missing_package(error)

    for name in ("igpt_jax.jobs.absent", "jax._src.absent", "numpy.absent", None):
        assert not message(name)
    assert "the package absent is not installed" in message("absent.part")
    assert "the package absent is not installed" in message(None, ModuleNotFoundError("no", name="absent"))
    for name in process.ON_PYPI.values():
        assert f"\n    {name.strip(chr(39))}>=" in (ROOT / "setup.cfg").read_text(), name


# Arguments after `igpt_jax`, and what the one line of the error contains.
MISTAKES = {
    "pretran": "Did you mean 'pretrain'?",
    "pretrain": "--workdir is missing",
    "pretrain --workdir=W --wrong=1": "flag '--wrong' is not known",
    "pretrain --workdir=W --data.store=S": "begin with --config: --config.data.store=VALUE",
    "pretrain --workdir=W --steps=3": "begin with --config: --config.steps=VALUE",
    "pretrain --workdir=W steps=3": "Settings are written --config.steps=3",
    "pretrain --workdir=W --config.lr=3": "Did you mean 'optimizer.learning_rate'?",
    "pretrain --workdir=W --config.gpu=3": ". --help lists all ",
    "pretrain --workdir=W --config.steps=1e3": "steps='1e3' must be of type int. Write 1000.",
    "pretrain --workdir=W word": "'word' is not a flag",
    "pretrain --workdir=W --config.stepz=3": "Did you mean 'steps'?",
    "pretrain --workdir=W --config.optimizer=3": "Set optimizer.name or optimizer.learning_rate or",
    "pretrain --workdir=W --config.steps=abc": "steps='abc' must be of type int",
    "pretrain --workdir=W --config.steps=0": "steps=0 must lie in [1, 2147483647]",
    "pretrain --workdir=W --config.keep_steps=a": "keep_steps[0]='a' must be of type int",
    "pretrain --workdir=W --config.wandb=me/digits/2": "must be PROJECT or ENTITY/PROJECT",
    "pretrain --workdir=W --config.model.name=igpt_z": "Did you mean 'igpt_s'?",
    "pretrain --workdir=W --config=missing.py": "missing.py does not exist",
    "pretrain --workdir=W --config=igpt_ll": "igpt_ll does not exist. Give a Python file, a run's config.json or a "
                                             "name. Did you mean 'igpt_l'?",
    "pretrain --workdir=W --config=configs/sample.py": "for the job 'sample', not 'pretrain'",
    "pretrain --workdir=W --config=configs/pretrain.py:stepz=1": "Did you mean 'steps'?",
    "pretrain --workdir=W --config=configs/pretrain.py:steps": "must have the form key=value",
}


def one_line(done) -> str:
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert len(lines) == 1 and lines[0].startswith("igpt_jax "), done.stderr
    assert not imports_jax(done), "JAX was imported before the mistake was found"
    return lines[0]


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistake_is_one_line(run_job, arguments):
    done = run_job(*arguments.split(), env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert MISTAKES[arguments] in one_line(done)


@pytest.mark.parametrize("line, message", [
    ("config.optimizer.learning_rat = 0.1", "line 7: config key 'learning_rat' is not known. Did you mean"),
    ("config.steps = config.stepz", "line 7: config key 'stepz' is not known. Did you mean 'steps'?"),
    ("config.steps = 'many'", "line 7: config key 'steps' must be of type int, not str"),
    ("config.model.heads = 3", "is not a multiple of model.heads=3"),
    ("unknown", "line 7: NameError"),
    ("return", "get_config() must return a ConfigDict"),
    ("if", "line 7: SyntaxError"),
    ("raise SystemExit('enough')", "line 7: SystemExit: enough"),
])
def test_mistake_in_a_config_file_names_its_line(run_job, tmp_path, line, message):
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(line=line))
    done = run_job("pretrain", f"--config={file}", f"--workdir={tmp_path}", env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert message in one_line(done)


def test_settings_are_applied_in_order(tmp_path, monkeypatch):
    """The file's settings, then those after its colon, then the flags. Seen to fail without `override` in `_load`."""
    from igpt_jax.command_line import _parse

    monkeypatch.chdir(ROOT)
    config, workdir = _parse("pretrain", ["--config=configs/igpt_l.py:steps=7,batch_size=2", "--workdir", "w",
                                          "--config.batch_size", "4", "--config.keep_steps=(1,2)"])
    assert (config.model.embed, config.steps, config.batch_size, workdir) == (1536, 7, 4, "w")
    assert config.keep_steps == (1, 2)


@pytest.mark.parametrize("given, key, value", [
    ("prepare:data=imagenet2012,image_size=64", "image_size", 64),
    ("scaling:pretrain.eval_every_steps=7,budgets=(1e9,2e9)", "pretrain.eval_every_steps", 7),
    ("plan:model=igpt_xl,batch_size=8", "batch_size", 8),
])
def test_settings_after_the_colon_win_over_the_file(given, key, value):
    """Seen to fail where a file sets its keys after the user's."""
    config, _ = command_line._parse(given.partition(":")[0], [f"--config={given}", "--workdir=w"])
    assert operator.attrgetter(key)(config) == value


@pytest.mark.parametrize("name", ["igpt_l", "igpt_l.py", "configs/igpt_l.py", "configs/igpt_l"])
def test_config_files_of_the_package_are_found_by_name(name, tmp_path, monkeypatch):
    """From any folder, and printed as JSON that `--config` takes. Seen to fail with the current folder's alone."""
    monkeypatch.chdir(tmp_path)
    printed = []
    monkeypatch.setattr(process, "say", lambda text, *_: printed.append(text))
    assert command_line.main(["pretrain", f"--config={name}:batch_size=2", "--config.steps=7", "--print_config"]) == 0
    given = json.loads(printed[0])
    assert (given["model"]["embed"], given["batch_size"], given["steps"]) == (1536, 2, 7)
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b" / "config.json").write_text(printed[0])
    config, _ = command_line._parse("pretrain", [f"--config={tmp_path}/a:b/config.json:steps=8", "--workdir=w"])
    assert json.loads(json.dumps(to_dict(config))) == {**given, "steps": 8}


def test_another_jobs_config_json_is_refused(tmp_path):
    for content, message in (('{"job": "probe"}', "for the job 'probe'"), ("[]", "not a run's config"),
                             ("{", "not a run's config"),
                             ('{"steps": "many"}', "must be of type int"), ('{"stepz": 1}', "Did you mean 'steps'")):
        (tmp_path / "c.json").write_text(content)
        with pytest.raises(UserError, match=message):
            command_line._parse("pretrain", [f"--config={tmp_path / 'c.json'}", "--workdir=w"])


def test_the_version(run_job):
    assert run_job("--version").stdout == f"igpt_jax {igpt_jax.__version__}\n"


@pytest.fixture
def config():
    return parse("prepare", base_config("prepare"))


def record(workdir, name):
    return json.loads((workdir / name).read_text())


def test_a_job_leaves_its_config_and_its_result(config, tmp_path):
    def run(config, workdir):
        assert record(tmp_path, "config.json")["source"] == "digits"
        assert not (tmp_path / "result.json").exists(), "an unfinished job must not look finished"
        with pytest.raises(UserError, match="in use"), storage.lock(storage.path(workdir)):
            pass
        return {"examples": 3, "images_per_second": float("nan")}

    for _ in range(2):
        assert runtime.run_job(run, config, str(tmp_path)) == 0
    result = record(tmp_path, "result.json")
    assert (result["job"], result["status"]) == ("prepare", "done")
    assert result["metrics"] == {"examples": 3, "images_per_second": None}
    assert result["device"]["platform"] == "cpu" and result["device"]["processes"] == 1
    assert result["versions"]["jax"] and result["wall_seconds"] >= 0


def test_precision_follows_the_platform_and_the_run(tmp_path):
    """auto: float32 on this CPU, in config.json too; but what the workdir's run has, if there is one."""
    def used(workdir, arguments=""):
        seen = []
        given = parse("pretrain", base_config("pretrain", arguments))
        assert runtime.run_job(lambda config, _: seen.append(config.precision) or {}, given, str(workdir)) == 0
        assert record(workdir, "config.json")["precision"] == seen[0]
        return seen[0]

    assert used(tmp_path / "a") == "float32" and used(tmp_path / "b", "precision=bfloat16") == "bfloat16"
    assert used(tmp_path / "b") == "bfloat16"


def test_the_last_line_names_what_to_open_and_the_command_is_saved(config, tmp_path, capsys):
    def run(config, workdir):
        storage.publish(tmp_path / "figures" / "completions.png", b"")
        return {}

    assert runtime.run_job(run, config, str(tmp_path), "igpt prepare 'a b'") == 0
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"done. [{tmp_path / 'figures' / 'completions.png'}]")
    assert (tmp_path / "command.txt").read_text() == "igpt prepare 'a b'\n"


@pytest.mark.parametrize("error, code, status", [
    (Preempted("stopped after step 3."), 75, "preempted"),
    (Diverged("non-finite since step 3."), 77, "diverged"),
    (UserError("no."), 2, None),
    (ZeroDivisionError("a bug"), 1, None),
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 2, None),
])
def test_each_end_has_its_exit_code(config, tmp_path, capsys, error, code, status):
    def run(config, workdir):
        raise error

    assert runtime.run_job(run, config, str(tmp_path)) == code
    assert (status is not None) == (tmp_path / "result.json").exists()
    assert status is None or record(tmp_path, "result.json")["status"] == status
    printed = capsys.readouterr().err
    assert str(error) in printed and ("Traceback" in printed) == (code == 1)


def test_the_environment_does_not_choose_the_random_numbers(config, tmp_path, capsys):
    """As JAX_DEFAULT_PRNG_IMPL=rbg sets it. Seen to fail without PINNED."""
    impl = []
    jax.config.update("jax_default_prng_impl", "rbg")
    assert runtime.run_job(lambda *_: impl.append(str(jax.random.key_impl(jax.random.key(0)))) or {}, config,
                           str(tmp_path)) == 0
    assert impl == ["threefry2x32"] and "JAX_DEFAULT_PRNG_IMPL has no effect here" in capsys.readouterr().err


def test_a_refused_config_keeps_the_previous_one(config, tmp_path, capsys):
    """Seen to fail without the restoring branch of `_config_file`."""
    def refuse(config, workdir):
        raise UserError("this workdir was made with another source.")

    assert runtime.run_job(lambda config, workdir: {}, config, str(tmp_path)) == 0
    other = parse("prepare", base_config("prepare", "source=synthetic"))
    assert runtime.run_job(refuse, other, str(tmp_path)) == 2
    assert record(tmp_path, "config.json")["source"] == "digits"
    assert runtime.run_job(refuse, parse("sample", base_config("sample")), str(tmp_path)) == 2
    assert "belongs to the job 'prepare'" in capsys.readouterr().err


def test_a_signal_asks_to_stop_and_a_second_one_ends_the_process(run_job, capsys, monkeypatch):
    """The former handlers are restored at the end. A second signal within a second counts as the same request, passed
    on by a launcher. Seen to fail without re-raising; without the second of grace pytest itself ends.
    """
    monkeypatch.setattr(signals, "GRACE_SECONDS", patience())  # or a slow machine would end pytest
    monkeypatch.setattr(signals, "time", types.SimpleNamespace(monotonic=lambda: 0.0))
    former = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        stop.saves = True
        assert not stop.should_stop()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.should_stop()
    assert signal.getsignal(signal.SIGTERM) == former
    assert "saving, then stopping" in capsys.readouterr().err
    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        done = run_job(number, script="two_signals.py")
        assert done.returncode == -number and not done.stdout, done


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_of_schedulers_ask_to_stop_unless_ignored(number):
    """`nohup` starts a job with SIGHUP ignored. Seen to fail with all of them handled."""
    former = signal.signal(number, signal.SIG_DFL)
    try:
        with StopSignal(saves=True) as stop:
            os.kill(os.getpid(), number)
            assert stop.should_stop()
        signal.signal(number, signal.SIG_IGN)
        with StopSignal(saves=True) as stop:
            os.kill(os.getpid(), number)
            assert not stop.should_stop() and signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, former)


def test_a_signal_with_nothing_to_save_ends_the_job_at_once(run_job):
    """In Python, and inside a compiler, where Python's signal handlers do not run. Seen to fail without the thread that
    handles signals: the process never ended.
    """
    with pytest.raises(Preempted, match="before there was anything new to save"):
        with StopSignal():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
    done = run_job(script="signal_while_compiling.py")
    assert done.returncode == 75 and "stopped before there was anything to save" in done.stderr, done


@pytest.mark.parametrize("job, code", [("prepare", 75), ("plan", 75), ("sample", 2)])
def test_launched_processes_stop_together(tmp_path, job, code):
    """Ctrl-C in one process stops both: at the same step where they save (prepare), at once where there is nothing to
    save (plan). A failure of one ends both. Seen to fail without notifying the others (plan), without passing SIGINT on
    as SIGTERM, with a Python handler of SIGTERM next to JAX's, and with `should_stop` that asks only its own process.
    """
    stand_in = tmp_path / "python"  # the launcher runs `stand_in -c CODE` and `stand_in -m igpt_jax JOB WORKDIR`
    stand_in.write_text(f"""#!/bin/sh
[ "$1" = -c ] && exec {sys.executable} "$@"
shift 2
exec {sys.executable} {SCRIPTS / 'launched.py'} "$@"
""")
    stand_in.chmod(0o755)
    done = subprocess.run([ROOT / "launch" / "local.sh", "2", job, tmp_path / "workdir"], text=True,
                          capture_output=True, timeout=patience(), env={**os.environ, "PYTHON": str(stand_in)})
    assert done.returncode == code, done.stderr
    assert (tmp_path / "workdir" / "config.json").exists()
    if job == "plan":
        assert done.stderr.count("before there was anything new to save") == 1, done.stderr  # process 0 reports
    elif code == 75:
        first, second = re.findall(r"stops at (\d+)", done.stdout)
        assert first == second
        assert record(tmp_path / "workdir", "result.json")["device"]["processes"] == 2
    else:
        assert "[1] igpt_jax pretrain: only process 1 sees this." in done.stderr
