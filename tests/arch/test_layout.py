"""The house rules that a machine can check."""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = sorted((ROOT / "omnilit").rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def test_files_have_at_most_500_lines():
    files = [*PACKAGE, *(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    long = {name(p): n for p in files if (n := len(p.read_text("utf-8").splitlines())) > 500}
    assert not long


def test_functions_have_at_most_60_lines():
    long = [
        (name(path), node.name)
        for path, tree in TREES.items()
        for node in functions(tree)
        # a docstring that explains every YAML field of a constructor is not length
        if (node.end_lineno or 0) - node.body[0].lineno > 60 and node.name != "__init__"
    ]
    assert not long


def test_importing_omnilit_loads_neither_torch_nor_transformers():
    heavy = ("torch", "transformers", "lightning")
    code = f"import omnilit, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("forbidden", ["except Exception", "except:", "global ", "print("])
def test_the_package_does_not_contain(forbidden):
    found = []
    for path in PACKAGE:
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            code = line.split("#")[0].strip()
            if code.startswith(forbidden):
                found.append(f"{name(path)}:{number}")
    assert not found


def test_only_families_ask_for_a_model_type():
    found = [
        f"{name(path)}:{node.lineno}"
        for path, tree in TREES.items()
        if "families" not in path.parts
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        and "model_type" in ast.unparse(node.left)
        and any(isinstance(leaf, ast.Constant) and leaf.value for leaf in ast.walk(node))
    ]
    assert not found


def test_only_our_triton_kernels_import_triton():
    found = [
        f"{name(path)}: {module}"
        for path, tree in TREES.items()
        if "triton" not in path.parts
        for node in ast.walk(tree)
        for module in imported_by(node)
        if "triton" in module.split(".")
    ]
    assert not found


def imported_by(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def test_init_files_only_re_export():
    allowed = (ast.Import, ast.ImportFrom, ast.Expr, ast.Assign, ast.AnnAssign)
    found = [
        name(path)
        for path, tree in TREES.items()
        if path.name == "__init__.py" and not all(isinstance(node, allowed) for node in tree.body)
    ]
    assert not found


def test_source_is_ascii():
    assert not [name(p) for p in PACKAGE if not p.read_text("utf-8").isascii()]


def test_the_readme_shows_commands_that_exist():
    readme = (ROOT / "README.md").read_text("utf-8")
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in ("demo", "test"):
        assert f"make {target}" in readme
        assert f"\n{target}:" in makefile


def test_no_folder_of_tests_is_passed_by(pytestconfig):
    """A pattern of folders that pytest does not enter has kept hundreds of tests from running."""
    patterns = pytestconfig.getini("norecursedirs")
    folders = {p.parent.relative_to(ROOT) for p in (ROOT / "tests").rglob("test_*.py")}
    passed_by = [f for f in folders if any(fnmatch(part, p) for part in f.parts for p in patterns)]
    assert folders
    assert not passed_by
