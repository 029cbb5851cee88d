"""The house: what is packaged, what is documented, what an import costs, what no file may do."""

import ast
import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fedge.core import errors

importlib.import_module("fedge.server.machine")  # defines a leaf of its own

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
ROOMS = {"fedge": "app"} | {
    name: folder for name, folder in PROJECT["tool"]["setuptools"]["package-dir"].items() if name != "fedge"
}
SOURCES = sorted(path for folder in ROOMS.values() for path in (ROOT / folder).rglob("*.py"))


def test_every_folder_with_code_is_packaged_and_no_other() -> None:
    found = set()
    for package, folder in ROOMS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_module_lies_in_a_package() -> None:
    bare = [str(path.relative_to(ROOT)) for path in SOURCES if not (path.parent / "__init__.py").is_file()]
    assert not bare


def test_no_folder_at_the_top_shadows_the_package() -> None:
    assert not (ROOT / "fedge").exists()


@pytest.mark.parametrize("leaf", errors.leaves(), ids=lambda leaf: leaf.__name__)
def test_every_error_is_documented_with_its_exit_code_and_status(leaf: type[errors.FedgeError]) -> None:
    text = (ROOT / "docs" / "errors.md").read_text("utf-8")
    _, heading, rest = text.partition(f"\n### {leaf.reason}\n")
    assert heading, f"docs/errors.md has no section {leaf.reason}"
    section = rest.split("\n#")[0]
    assert section.startswith(f"Exit code {leaf.exit_code}, status `{leaf.status}`.")


def test_reasons_are_unique() -> None:
    reasons = [leaf.reason for leaf in errors.leaves()]
    assert len(reasons) == len(set(reasons))


LOADED = "import sys, json; {}; print(json.dumps(sorted(sys.modules)))"
HEAVY = {"torch", "matplotlib", "sqlite3", "grpc", "asyncio", "tensorboard", "rich"}


@pytest.mark.parametrize(
    ("what", "never"),
    [
        ("import fedge", HEAVY | {"numpy", "msgspec"}),
        ("import fedge; fedge.Experiment, fedge.load_run, fedge.Update, fedge.FedgeError", HEAVY),
        ("import fedge; fedge.aggregate([[1.0], [3.0]])", {"torch", "matplotlib", "sqlite3", "grpc", "tensorboard"}),
        ("import fedge.server.machine", HEAVY),
        ("import fedge.server.coordinator", {"torch", "matplotlib", "tensorboard"}),
        ("import fedge.client.runtime", {"torch", "matplotlib", "sqlite3", "tensorboard", "fedge.server"}),
    ],
)
def test_an_import_loads_no_more_than_it_needs(what: str, never: set[str]) -> None:
    done = subprocess.run([sys.executable, "-c", LOADED.format(what)], capture_output=True, text=True, check=True)
    assert never.isdisjoint(json.loads(done.stdout))


def _imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


def _unsafe_calls(tree: ast.AST) -> list[str]:
    """torch.load, and any call that allows pickles."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            allowed = [word for word in node.keywords if word.arg == "allow_pickle"]
            found += [
                "allow_pickle"
                for word in allowed
                if not (isinstance(word.value, ast.Constant) and not word.value.value)
            ]
            if ast.unparse(node.func) in ("torch.load", "eval", "exec"):
                found.append(ast.unparse(node.func))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_can_run_what_it_reads(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    assert not _imports(tree) & {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    assert not _unsafe_calls(tree)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_owns(path: Path) -> None:
    if not path.name.endswith(("_pb2.py", "_pb2_grpc.py")):
        assert ast.get_docstring(ast.parse(path.read_text("utf-8")))
