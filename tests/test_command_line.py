"""The command line and what surrounds a job: mistakes, its workdir's records, exit codes, signals."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import pytest
from conftest import patience

from igpt_jax import process, storage
from igpt_jax.config import UserError, base_config, parse
from igpt_jax.runtime import job as runtime
from igpt_jax.runtime.exits import Diverged, Preempted
from igpt_jax.runtime.signals import StopSignal

ROOT = pathlib.Path(__file__).parent.parent
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
    """A command of the shell, in which `igpt` stands for `python -m igpt_jax`."""
    igpt = f'igpt() {{ {sys.executable} -m igpt_jax "$@"; }}'
    return subprocess.run(["bash", "-c", f"set -o pipefail; {igpt}; {command}"], text=True, capture_output=True,
                          timeout=patience(30), cwd=ROOT)


@pytest.mark.parametrize("command, code, says", [
    ("igpt --help | head -n 1", 0, ""),
    ("igpt pretrain --help | head -c 1", 0, ""),
    ("igpt --help > /dev/full", 0, "igpt_jax: stdout cannot be written: [Errno 28] No space left on device\n"),
    ("igpt pretran 2> /dev/full", 2, ""),
    ("igpt --help >&- 2>&- <&-", 0, ""),
    ("igpt pretran >&- 2>&-", 2, ""),
    ("PYTHONIOENCODING=ascii igpt 'pr\u00e9parer'", 2, "igpt_jax pr\\xe9parer: this job is not known. Did you mean "
                                                    "'prepare'?\n"),
])
def test_streams_that_nobody_reads(command, code, says):
    """Seen to fail with a plain `print`, and without `open_streams`."""
    done = shell(command)
    assert (done.returncode, done.stderr) == (code, says)


def test_a_file_never_gets_the_number_of_a_closed_stream():
    """What C++ or a subprocess prints would end in it. Seen to fail without `open_streams`."""
    script = ("import os, subprocess, sys; from igpt_jax import process; process.open_streams();"
              "file = os.open('/dev/null', 0); assert file > 2, file;"
              "print('out'); sys.stderr.write('err'); subprocess.run(['sh', '-c', 'echo told >&2'], check=True)")
    assert subprocess.run(["bash", "-c", f'exec {sys.executable} -c "{script}" >&- 2>&- <&-'], cwd=ROOT).returncode == 0


PACKAGE_MISSING = """
import sys
sys.modules[sys.argv[1]] = None
from igpt_jax.__main__ import main
sys.exit(main(["verify", "--workdir=w"]))
"""


@pytest.mark.parametrize("package, install", [("ml_collections", "ml_collections"),
                                              ("orbax.checkpoint", "orbax-checkpoint")])
def test_a_missing_package_is_told_in_one_line(package, install, tmp_path):
    """At the start, and once a job begins. Seen to fail without the branch of `__main__`."""
    done = subprocess.run([sys.executable, "-c", PACKAGE_MISSING, package], text=True, capture_output=True,
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"is not installed. Run: pip install {install}, or all that igpt_jax needs: pip install -e " in done.stderr


@pytest.mark.parametrize("variable", ["JAX_ENABLE_X64", "JAX_DEFAULT_DEVICE", "JAX_DEFAULT_PRNG_IMPL"])
def test_a_variable_that_jax_refuses_is_told_in_one_line(run_job, variable):
    """Seen to fail with a plain import of JAX."""
    done = run_job("verify", "--workdir=w", env={variable: "word"})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and f"{variable}='word'" in done.stderr


def test_only_a_package_that_is_not_there_is_missing():
    """A module of ours, or a part of a package that is installed, is a bug and keeps its traceback."""
    def told(name, cause=None):
        error = ModuleNotFoundError("no", name=name)
        error.__cause__ = cause
        return process.missing_package(error)

    for name in ("igpt_jax.jobs.absent", "jax._src.absent", "numpy.absent", None):
        assert not told(name)
    assert "the package absent is not installed" in told("absent.part")
    assert "the package absent is not installed" in told(None, ModuleNotFoundError("no", name="absent"))
    for name in process.ON_PYPI.values():
        assert f"\n    {name.strip(chr(39))}>=" in (ROOT / "setup.cfg").read_text(), name


# What is typed after `igpt_jax`, and what the one line must say.
MISTAKES = {
    "pretran": "Did you mean 'pretrain'?",
    "pretrain": "--workdir is missing",
    "pretrain --workdir=W --wrong=1": "flag '--wrong' is not known",
    "pretrain --workdir=W word": "'word' is not a flag",
    "pretrain --workdir=W --config.stepz=3": "Did you mean 'steps'?",
    "pretrain --workdir=W --config.optimizer=3": "Set optimizer.learning_rate or",
    "pretrain --workdir=W --config.steps=abc": "steps='abc' must be of type int",
    "pretrain --workdir=W --config.steps=0": "steps=0 must be at least 1",
    "pretrain --workdir=W --config.keep_steps=a": "keep_steps[0]='a' must be of type int",
    "pretrain --workdir=W --config.wandb=me/digits/2": "must read PROJECT or ENTITY/PROJECT",
    "pretrain --workdir=W --config.model.name=igpt_z": "Did you mean 'igpt_s'?",
    "pretrain --workdir=W --config=missing.py": "missing.py does not exist",
    "pretrain --workdir=W --config=configs/pretrain": "must name a Python file",
    "pretrain --workdir=W --config=configs/sample.py": "for the job 'sample', not 'pretrain'",
    "pretrain --workdir=W --config=configs/pretrain.py:stepz=1": "Did you mean 'steps'?",
    "pretrain --workdir=W --config=configs/pretrain.py:steps": "must read key=value",
}


def one_line(done) -> str:
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert len(lines) == 1 and lines[0].startswith("igpt_jax "), done.stderr
    assert not imports_jax(done), "JAX was imported before the mistake was found"
    return lines[0]


@pytest.mark.parametrize("typed", MISTAKES)
def test_mistake_is_one_line(run_job, typed):
    done = run_job(*typed.split(), env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert MISTAKES[typed] in one_line(done)


@pytest.mark.parametrize("line, says", [
    ("config.optimizer.learning_rat = 0.1", "line 7: config key 'learning_rat' is not known. Did you mean"),
    ("config.steps = config.stepz", "line 7: config key 'stepz' is not known. Did you mean 'steps'?"),
    ("config.steps = 'many'", "line 7: config key 'steps' must be of type int, not str"),
    ("config.model.heads = 3", "is not a multiple of model.heads=3"),
    ("unknown", "line 7: NameError"),
    ("return", "get_config() must return a ConfigDict"),
    ("if", "line 7: SyntaxError"),
    ("raise SystemExit('enough')", "line 7: SystemExit: enough"),
])
def test_mistake_in_a_config_file_names_its_line(run_job, tmp_path, line, says):
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(line=line))
    done = run_job("pretrain", f"--config={file}", f"--workdir={tmp_path}", env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert says in one_line(done)


def test_settings_are_applied_in_order(tmp_path, monkeypatch):
    """The file's settings, then what follows its colon, then the flags. Seen to fail without `override` in `_load`."""
    from igpt_jax.command_line import _parse

    monkeypatch.chdir(ROOT)
    config, workdir = _parse("pretrain", ["--config=configs/igpt_l.py:steps=7,batch_size=2", "--workdir", "w",
                                          "--config.batch_size", "4", "--config.keep_steps=(1,2)"])
    assert (config.model.embed, config.steps, config.batch_size, workdir) == (1536, 7, 4, "w")
    assert config.keep_steps == (1, 2)


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


@pytest.mark.parametrize("error, code, status", [
    (Preempted("stopped after step 3."), 75, "preempted"),
    (Diverged("non-finite since step 3."), 77, "diverged"),
    (UserError("no."), 2, None),
    (ZeroDivisionError("a bug"), 1, None),
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


def test_a_refused_config_leaves_the_former_one(config, tmp_path, capsys):
    """Seen to fail without the restoring branch of `_config_file`."""
    def refuse(config, workdir):
        raise UserError("this workdir was made with another source.")

    assert runtime.run_job(lambda config, workdir: {}, config, str(tmp_path)) == 0
    other = parse("prepare", base_config("prepare", "source=synthetic"))
    assert runtime.run_job(refuse, other, str(tmp_path)) == 2
    assert record(tmp_path, "config.json")["source"] == "digits"
    assert runtime.run_job(refuse, parse("sample", base_config("sample")), str(tmp_path)) == 2
    assert "belongs to the job 'prepare'" in capsys.readouterr().err


def test_a_signal_asks_to_stop_and_a_second_one_ends_the_process(python, capsys):
    """Handlers return to what they were at the end; what follows within a second is the same request, passed on by a
    launcher. Seen to fail without re-raising; with the second of grace left out pytest itself ends.
    """
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
        python(f"""
import subprocess, sys
script = "import os, time; from igpt_jax.runtime.signals import StopSignal; stop = StopSignal().__enter__();" \\
         "stop.saves = True; os.kill(os.getpid(), {number}); time.sleep(1.1); " \\
         "os.kill(os.getpid(), {number}); print('still here')"
done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
assert done.returncode == -{number} and not done.stdout, done
""", devices=1)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_what_schedulers_send_asks_to_stop_where_it_is_not_ignored(number):
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


COMPILES_FOR_EVER = """
import ctypes, os, threading, jax._src.compiler
from igpt_jax.runtime.signals import GRACE_SECONDS, StopSignal

GRACE_SECONDS = 0.3
mutex = ctypes.create_string_buffer(64)
lock = ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
with StopSignal():
    threading.Timer(0.5, os.kill, (os.getpid(), 15)).start()
    exec(compile("lock(mutex)", jax._src.compiler.__file__, "exec"))
"""


def test_a_signal_before_there_is_anything_to_save_ends_the_job_where_it_is(run_job):
    """In Python; and inside a compiler, which hears no exception. Seen to fail without the thread that hears
    signals: the process never ended.
    """
    with pytest.raises(Preempted, match="before there was anything new to save"):
        with StopSignal():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
    done = run_job(script=COMPILES_FOR_EVER)
    assert done.returncode == 75 and "stopped before there was anything to save" in done.stderr, done


LAUNCHED = """#!{python}
import os, signal, sys, time
if sys.argv[1] == "-c":
    exec(sys.argv[2])
    sys.exit()
import jax
from igpt_jax.runtime.exits import Preempted
from igpt_jax.runtime.job import run_job
from igpt_jax.runtime.signals import StopSignal
from igpt_jax.config import UserError, base_config, parse


def run(config, workdir):
    assert jax.process_count() == 2
    with StopSignal(saves=sys.argv[3] != "plan") as stop:
        for step in range(1, 10**5):
            time.sleep(0.02)
            if step == 5 and jax.process_index() == 1:
                if sys.argv[3] == "sample":
                    raise UserError("only process 1 sees this.")
                os.kill(os.getpid(), signal.SIGINT)
            if stop.saves and stop.should_stop():
                print(f"stops at {{step}}", flush=True)
                raise Preempted("stopped.")


sys.exit(run_job(run, parse("pretrain", base_config("pretrain")), sys.argv[4]))
"""


@pytest.mark.parametrize("job, code", [("prepare", 75), ("plan", 75), ("sample", 2)])
def test_launched_processes_stop_together(tmp_path, job, code):
    """Ctrl-C in one process stops both: at one step where they save (prepare), at once where there is nothing to save
    (plan). A failure of one ends both. Seen to fail without telling the others (plan), without passing SIGINT on as
    SIGTERM, with a SIGTERM handler of Python's beside JAX's, and with `should_stop` that asks only its own process.
    """
    stand_in = tmp_path / "python"  # started by the launcher as `stand_in -m igpt_jax JOB WORKDIR`
    stand_in.write_text(LAUNCHED.format(python=sys.executable))
    stand_in.chmod(0o755)
    done = subprocess.run([ROOT / "launch" / "local.sh", "2", job, tmp_path / "workdir"], text=True,
                          capture_output=True, timeout=patience(), env={**os.environ, "PYTHON": str(stand_in)})
    assert done.returncode == code, done.stderr
    assert (tmp_path / "workdir" / "config.json").exists()
    if job == "plan":
        assert done.stderr.count("before there was anything new to save") == 1, done.stderr  # process 0's word
    elif code == 75:
        first, second = re.findall(r"stops at (\d+)", done.stdout)
        assert first == second
        assert record(tmp_path / "workdir", "result.json")["device"]["processes"] == 2
    else:
        assert "[1] igpt_jax pretrain: only process 1 sees this." in done.stderr
