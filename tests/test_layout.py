"""The layout is a total order: a file imports only from files above it in this list."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parent.parent / "igpt_jax"
ORDER = [
    "process", "config", "storage", "side_files",
    "palette", "topology", "sharding", "checksum", "attention.reference", "attention.context",
    "attention.blocked", "attention.splash", "attention", "model", "objectives", "features", "decode", "export",
    "linear_probe", "optimizer", "steps", "data.order", "data.images", "data.sources", "data.store", "data.ingest",
    "data.colours", "data.augment", "data.ledger", "data.stage", "data", "data.tokens", "data.resident",
    "data.pipeline", "data.records", "orbax_s3", "integrity", "step_folders", "checkpoint", "transfer", "weights",
    "telemetry", "metric_writers", "profiling", "figures", "watchdog", "launcher", "roll_call", "startup", "runtime",
    "table", "evaluation", "surprise", "probing", "arrivals", "planner", "loop", "report", "jobs",
    "command_line",
    "__main__",
]
MAY_IMPORT_TENSORFLOW = {"data.pipeline", "data.records", "weights.openai"}
WITHOUT_JAX = {"process", "config", "storage", "palette", "topology"}


def place(module: str) -> str:
    """The entry of ORDER that a module of the package belongs to."""
    parts = module.split(".")
    if parts[0] in ("jobs", "planner", "report", "weights"):
        return parts[0]
    if parts[:2] == ["data", "sources"]:
        return "data.sources"
    return module


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules() -> dict[str, ast.AST]:
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = list(file.relative_to(PACKAGE).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and parts[1:] else parts)
        found[name] = ast.parse(file.read_text())
    return found


def ours(name: str, known: dict[str, ast.AST]) -> str | None:
    """The module of the package that an imported name lies in; None where it is not ours."""
    parts = name.split(".")[1:] if name.startswith("igpt_jax.") else []
    while parts and ".".join(parts) not in known:
        parts.pop()
    return ".".join(parts) or None


def test_imports_only_go_up_the_list():
    """Seen to fail with `from igpt_jax import loop` in config.py."""
    known = modules()
    known.pop("__init__")
    for module, tree in known.items():
        assert place(module) in ORDER, f"{module} has no place in the order"
        for name in imported(tree):
            target = ours(name, known)
            if target is None or target.startswith(f"{module}.") or target == module:
                continue  # not ours; or a package's front door, which opens the package's own files
            assert ORDER.index(place(target)) <= ORDER.index(place(module)), f"{module} imports {target}, below it"
            if place(target) == place(module) == "jobs":
                assert target == "jobs", f"{module} imports another job, {target}"


def test_tensorflow_is_imported_in_few_files():
    """Seen to fail with `import tensorflow` in data/store.py."""
    for module, tree in modules().items():
        names = {name.split(".")[0] for name in imported(tree)}
        assert "tensorflow" not in names or module in MAY_IMPORT_TENSORFLOW, module


def test_time_outs_come_from_one_place():
    """A literal one would depend on the speed of the machine. Seen to fail with `timeout=120` in test_faults.py."""
    for file in sorted(pathlib.Path(__file__).parent.glob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            calls = node.keywords if isinstance(node, ast.Call) else []
            given = [word.value for word in calls if word.arg == "timeout"]
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "timeout":
                given += node.args
            assert not any(isinstance(each, ast.Constant) for each in given), f"{file.name}, line {node.lineno}"


def test_what_runs_before_jax_does_not_import_it():
    """Seen to fail with `import jax` in storage.py. The command line reaches JAX only through runtime and jobs."""
    for module, tree in modules().items():
        if module in WITHOUT_JAX or module in ("command_line", "__main__"):
            assert not {"jax", "flax"} & {name.split(".")[0] for name in imported(tree)}, module
