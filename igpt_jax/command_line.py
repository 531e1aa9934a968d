"""The command line: lists jobs, prints their help, or checks a job's flags and config and starts it.

JAX takes seconds to import. It is imported only once the flags and the config are known to be valid.
"""

import ast
import importlib
import importlib.util
import json
import operator
import os
import pathlib
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from igpt_jax import __version__, completion, process, storage
from igpt_jax.config import (
    JOBS,
    MODELS,
    UserError,
    aliases,
    base_config,
    keys,
    nearest,
    override,
    parse,
    plain,
    to_dict,
    wrong_type,
)

PROCESS_FLAGS = {
    "coordinator": "HOST:PORT on which process 0 listens; not needed under a known launcher such as srun",
    "processes": "number of processes",
    "process_id": "number of this process, from 0",
}
CONFIG_FOLDERS = (pathlib.Path(__file__).parent / "configs",  # of an installed package
                  pathlib.Path(__file__).parent.parent / "configs")  # of a checkout
USAGE = "python -m igpt_jax {job} [--config=FILE[:key=value,...]] {workdir} [--config.key=value ...]"
WITHOUT_WORKDIR = ("demo",)  # jobs that write nothing unless they are given one


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `python -m igpt_jax ARGUMENTS` and returns the exit code.

    Args:
      arguments: None takes those of the process, which then ends here, without Python's slow cleanup.
    """
    job, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if job in ("-h", "--help", "help"):
        process.say(_job_list())
        return 0
    if job in ("--version", "version"):
        process.say(f"igpt_jax {__version__}")
        return 0
    if job == "completion":
        process.say(completion.script(_config_names()))
        return 0
    try:
        if job not in JOBS:
            raise UserError(f"this job is not known. {nearest(job, list(JOBS))}")
        if {"-h", "--help"} & set(rest):
            process.say(_job_help(job))
            return 0
        if "--print_config" in rest:
            config, _ = _parse(job, [each for each in rest if each != "--print_config"] + ["--workdir=unused"])
            process.say(json.dumps(to_dict(config), indent=2))
            return 0
        config, workdir = _parse(job, rest)
        # TensorFlow only reads files here. With oneDNN enabled it prints four lines of warnings when it is imported.
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
        # A plan for other devices needs none of this machine's accelerators, which another job may be using.
        if job == "plan" and config.topology != "attached":
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
        # A signal during the import of JAX ends the process at once, without a traceback: nothing has started yet.
        for number in process.stop_signals():
            signal.signal(number, lambda number, frame: os._exit(75))
        _import_jax()
    except UserError as error:
        process.say(f"igpt_jax {job}: {error}", sys.stderr)
        return 2
    from igpt_jax.runtime.job import run_job
    from igpt_jax.runtime.signals import leave

    command = shlex.join(["python", "-m", "igpt_jax", job, *rest])
    code = run_job(importlib.import_module(f"igpt_jax.jobs.{job}").run, config, workdir, command)
    if arguments is None:
        leave(code)
    return code


def _import_jax() -> None:
    """Imports JAX, which reads its environment variables then. Raises UserError where it refuses one."""
    try:
        importlib.import_module("jax")
    except ValueError as error:
        given = ", ".join(f"{name}={value!r}" for name, value in sorted(os.environ.items()) if name.startswith("JAX_"))
        raise UserError(f"JAX does not start: {_one_line(error)}. Correct or unset that variable: {given}") from None


def _job_list() -> str:
    width = max(map(len, [*JOBS, *MODELS]))
    lines = [f"  {job:{width}}  {does}" for job, does in JOBS.items()]
    models = [f"  {name:{width}}  {layers} layers, width {embed}, {heads} heads"
              for name, (layers, embed, heads) in MODELS.items()]
    return "\n".join(["Image GPT in JAX. Jobs:", *lines, "", "Models (--config.model.name=NAME):", *models, "",
                      f"Config files (--config=NAME): {', '.join(_config_names())}", "",
                      USAGE.format(job="JOB", workdir="--workdir=DIR"),
                      "python -m igpt_jax JOB --help lists a job's config keys. --version prints the version.",
                      'Completion of words in bash: eval "$(igpt completion)"',
                      "From Python: import igpt_jax; model = igpt_jax.load(WORKDIR); help(model)."])


def _job_help(job: str) -> str:
    # The docstring is read from the source file, because importing the job would import JAX.
    source = importlib.util.find_spec(f"igpt_jax.jobs.{job}").origin
    with open(source, encoding="utf-8") as file:
        doc = ast.get_docstring(ast.parse(file.read()))
    table = [(f"{name}={default!r}", meaning) for name, default, meaning in keys(job) if name != "job"]
    width = max(len(setting) for setting, _ in table if len(setting) <= 40)
    lines = [f"  --config.{setting:{width}}  {meaning}" for setting, meaning in table]
    def listed(flags: dict[str, str]) -> list[str]:
        return [f"  --{name:{width + 7}}  {meaning}" for name, meaning in flags.items()]

    usage = USAGE.format(job=job, workdir="[--workdir=DIR]" if job in WITHOUT_WORKDIR else "--workdir=DIR")
    return "\n".join([doc, "", usage, "", "Config keys and their defaults:", *lines, "", *listed(
        {"print_config": "print the config that these flags give, as JSON, and stop"}), "",
                      "Processes (docs/launching.md):", *listed(PROCESS_FLAGS)])


def _parse(job: str, arguments: Sequence[str]) -> tuple[Any, str]:
    """The validated config and the workdir. Raises UserError."""
    own = flags.FlagValues()
    own.set_gnu_getopt(True)
    flags.DEFINE_string("config", None, "config file", flag_values=own)
    flags.DEFINE_string("workdir", None, "folder for everything that the job writes", flag_values=own)
    for name, meaning in PROCESS_FLAGS.items():
        flags.DEFINE_string(name, None, meaning, flag_values=own)
    try:
        rest = own([job, *arguments], known_only=True)
    except flags.Error as error:
        raise UserError(_one_line(error)) from None
    # `runtime/launchers.py` reads these variables, whoever sets them.
    os.environ.update({f"IGPT_{name.upper()}": own[name].value for name in PROCESS_FLAGS if own[name].value})
    config = _load(job, own["config"].value) if own["config"].present else base_config(job)
    _override(job, config, rest)
    without = job in WITHOUT_WORKDIR and not own["workdir"].present
    if not without and (not own["workdir"].value or own["workdir"].value.startswith("-")):
        raise UserError(f"--workdir is missing. Say where results go: --workdir=runs/{job}")
    return parse(job, config), own["workdir"].value or ""


def _override(job: str, config: ConfigDict, rest: list[str]) -> None:
    """Applies `--config.key=value` flags."""
    known = [name for name, *_ in keys(job) if name != "job"]
    for flag in filter(None, (re.match(r"--?([a-zA-Z][^=]*)", argument) for argument in rest[1:])):
        if not flag[1].startswith("config."):
            key = next((name for name in known if flag[1] in (name, name.rpartition(".")[2])), "")
            raise UserError(f"flag {flag[0]!r} is not known. " + (
                f"Config keys begin with --config: --config.{key}=VALUE" if key else "Flags: --config, --workdir, "
                f"--config.key=value, {', '.join(f'--{name}' for name in PROCESS_FLAGS)}, --print_config."))
        if (name := flag[1].removeprefix("config.")) in (former := aliases(job)):
            process.say(f"igpt_jax {job}: config key {name!r} is now called {former[name]!r}.", sys.stderr)
        elif name not in known:
            group = [key for key in known if key.startswith(f"{name}.")]
            if group:
                raise UserError(f"config key {name!r} is a group. Set {' or '.join(group)}.")
            raise UserError(f"config key {name!r} is not known. {nearest(name, known)}")
    overrides = flags.FlagValues()
    overrides.set_gnu_getopt(True)
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=overrides, sys_argv=rest)
        left_over = overrides(rest)[1:]
    except flags.IllegalFlagValueError as error:
        name, value = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.DOTALL).groups()
        kind = type(operator.attrgetter(name)(config)).__name__
        raise wrong_type(name, value, kind) from None
    except flags.Error as error:
        raise UserError(_one_line(error)) from None
    if left_over:
        form = "--config." + (left_over[0] if left_over[0].partition("=")[0] in known else "key=value")
        raise UserError(f"{left_over[0]!r} is not a flag. Settings are written {form}")


def _config_names() -> list[str]:
    """The names of the config files that come with the package."""
    return sorted({file.stem for folder in CONFIG_FOLDERS for file in folder.glob("*.py")})


def _config_file(name: str) -> bytes:
    """The text of a config file: a path, or the name of one that comes with the package (igpt_l, configs/igpt_l.py).

    Raises:
      UserError: there is none.
    """
    path = storage.path(name)
    if name.endswith((".py", ".json")) and path.exists():
        return storage.read(path)
    if re.fullmatch(r"(configs/)?\w+(\.py)?", name):
        for folder in CONFIG_FOLDERS:
            if (file := folder / f"{path.stem}.py").exists():
                return file.read_bytes()
    raise UserError(f"--config: {name} does not exist. Give a Python file, a run's config.json or a name. "
                    f"{nearest(path.stem, _config_names())}")


def _load(job: str, argument: str) -> ConfigDict:
    """The config of `--config=FILE[:key=value,...]`: the job's base config with the changes of FILE's get_config, or of
    a run's config.json.

    A config file is the user's own program, so any error in it is reported with its line number.
    """
    match = (re.fullmatch(r"((?:configs/)?\w+)(?::(?!//)(.*))?", argument, re.DOTALL)  # a name; not gs://
             or re.fullmatch(r"(.+?\.(?:py|json))(?::(.*))?", argument, re.DOTALL))
    file, arguments = match.groups() if match else (argument, None)
    source = _config_file(file)
    if file.endswith(".json"):
        return _recorded(job, file, source, arguments or "")
    try:
        names = {"__name__": "config_file", "__file__": file}
        exec(compile(source, file, "exec", dont_inherit=True), names)
        if "get_config" not in names:
            raise UserError("get_config() is missing. Define it to return a changed igpt_jax.config.base_config(job).")
        given = names["get_config"](*([] if arguments is None else [arguments]))
        if not isinstance(given, ConfigDict):
            raise UserError(f"get_config() must return a ConfigDict, not {type(given).__name__}")
        # Checked first, because the keys of another job's config would be reported as unknown.
        parse(job, {"job": given.get("job", job)})
        config = base_config(job)
        config.update(plain(job, given))
        return config
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f"{file} line {line}" if line else file
        raise UserError(f"{where}: {_config_error(job, error)}") from None


def _recorded(job: str, file: str, source: bytes, arguments: str) -> ConfigDict:
    """The config in a run's config.json."""
    try:
        given = storage.parse_json(source)
        parse(job, given)
        config = base_config(job)
        config.update(plain(job, given))
        return override(config, arguments)
    except (ValueError, AttributeError):
        raise UserError(f"--config={file}: this is not a run's config.json. Give one of `igpt {job}`.") from None
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _config_error(job: str, error: Exception) -> str:
    if unknown := re.search(r'Key "(\w+)" does not exist|instead of "(\w+)"', str(error)):
        word = unknown[1] or unknown[2]
        known = sorted({part for name, *_ in keys(job) for part in name.split(".")})
        return f"config key {word!r} is not known. {nearest(word, known)}"
    if wrong := re.search(r"override field '(\w+)'.* type <class '(\w+)'> .* type <class '(\w+)'>", str(error)):
        return f"config key {wrong[1]!r} must be of type {wrong[3]}, not {wrong[2]}"
    return f"{type(error).__name__}: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
