"""The layout is a total order, stated once, in docs/architecture.md: a file imports only from files listed above it."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "igpt_jax"
MAY_IMPORT_TENSORFLOW = {"data.pipeline", "data.records", "weights.openai"}
WITHOUT_JAX = re.compile(r"config\b|storage\b|parallel\.topology$|command_line$|process$|__main__$")
LONGEST_FILE, LONGEST_FUNCTION = 400, 60  # lines; a function's docstring does not count


def listed() -> list[str]:
    """The modules in docs/architecture.md, in order: 'config.keys', ...; a room comes after its files."""
    tree = (ROOT / "docs" / "architecture.md").read_text().split("    igpt_jax/\n")[1].splitlines()
    order, open_rooms = [], []
    for line in tree:
        name = re.match(r"( +)([\w.]+)(/?)", line)
        depth = (len(name[1]) - 6) // 2
        while len(open_rooms) > depth:
            order.append(".".join(open_rooms))
            open_rooms.pop()
        if name[3]:
            open_rooms.append(name[2])
        else:
            order.append(".".join([*open_rooms, name[2].removesuffix(".py")]))
    return order


def modules() -> dict[str, pathlib.Path]:
    """The package's files by module; a room's `__init__` has the room's name."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    found.pop("")
    return found


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(name: str, known: dict[str, pathlib.Path]) -> str | None:
    """The module of the package that an imported name lies in; None where it is not ours."""
    parts = name.split(".")[1:] if name.startswith("igpt_jax.") else []
    while parts and ".".join(parts) not in known:
        parts.pop()
    return ".".join(parts) or None


def test_the_tree_lists_every_file():
    """Seen to fail with a file added to the package, and with a line left out of the tree."""
    assert sorted(listed()) == sorted(modules())


def test_imports_only_go_up_the_list():
    """Seen to fail with `from igpt_jax.training import loop` in config/keys.py, and with two files swapped."""
    known, order = modules(), listed()
    for module, file in known.items():
        for name in imported(ast.parse(file.read_text())):
            target = ours(name, known)
            if target is not None and target != module:
                assert order.index(target) < order.index(module), f"{module} imports {target}"
                assert not (target.startswith("jobs.") and module.startswith("jobs.")), f"{module} imports {target}"


def test_tensorflow_is_imported_in_few_files():
    """Seen to fail with `import tensorflow` in data/store/reader.py."""
    for module, file in modules().items():
        names = {name.split(".")[0] for name in imported(ast.parse(file.read_text()))}
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
    """Seen to fail with `import jax` in storage/paths.py. __main__ reaches JAX only through runtime and the jobs."""
    for module, file in modules().items():
        if WITHOUT_JAX.match(module):
            assert not {"jax", "flax"} & {name.split(".")[0] for name in imported(ast.parse(file.read_text()))}, module


def code_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = function.body[0]
    doc = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if doc else 0)


def test_files_and_functions_stay_short():
    """Seen to fail with either limit lowered. Exceptions are named, with reasons, in docs/decisions.md."""
    exceptions = set(re.findall(r"`(\S+?)` \(\d+ lines\)", (ROOT / "docs" / "decisions.md").read_text()))
    long = set()
    for file in [file for folder in ("igpt_jax", "tests", "benchmarks") for file in (ROOT / folder).rglob("*.py")]:
        text, name = file.read_text(), str(file.relative_to(ROOT))
        if len(text.splitlines()) > LONGEST_FILE:
            long.add(name)
        long |= {f"{name}:{node.name}" for node in ast.walk(ast.parse(text))
                 if isinstance(node, ast.FunctionDef) and code_lines(node) > LONGEST_FUNCTION}
    assert long <= exceptions, f"too long: {sorted(long - exceptions)}"
