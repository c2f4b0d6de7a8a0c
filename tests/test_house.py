"""The rules of the house, read from the source: who may import what, no side effects, nothing without a docstring."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path
from types import FunctionType, ModuleType

import jax
import numpy as np
import pytest

import cedarjax

PACKAGE = Path(cedarjax.__file__).parent
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
TABLES = [file for file in FILES if file.endswith("/__init__.py")]
MODULES = ["cedarjax", *sorted(module.name for module in pkgutil.walk_packages([str(PACKAGE)], "cedarjax."))]

MAX_LINES = 350
STANDARD = set("abc collections contextlib dataclasses enum functools heapq inspect itertools".split())
STANDARD |= set("math numbers operator types typing".split())
NUMPY = ("data/", "metrics/communication.py", "privacy/accounting.py")
FLAX = ("nn/",)
CHEX = ("testing",)
# Extras, each imported inside the functions of one file.
ACCOUNTING, CORRELATED, CKKS = ("privacy/accounting.py",), ("privacy/correlated.py",), ("privacy/homomorphic.py",)
JIT = ("testing",)  # whose job is to compare jit with no jit


def parse(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"))


def imports(tree: ast.Module, file: str) -> set[str]:
    """Dotted names that a file imports; `from a import b` counts as `a.b`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = ("cedarjax", *Path(file).parts[:-1])
                base = ".".join([*above[: len(above) - node.level + 1], *([base] if base else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def family(file: str) -> str:
    """`robust` for `robust/krum.py`, "" for the files at the top."""
    parts = Path(file).parts
    return parts[0] if len(parts) > 1 else ""


@pytest.mark.parametrize("file", [file for file in FILES if family(file)])
def test_a_family_rests_on_core_and_itself_only(file):
    own = {name for name in imports(parse(file), file) if name.split(".")[0] == "cedarjax"}
    rooms = {f"cedarjax.{room}." for room in ("core", family(file))}
    strangers = {name for name in own if not any(f"{name}.".startswith(room) for room in rooms)}
    assert not strangers


@pytest.mark.parametrize("file", FILES)
def test_only_allowed_packages_are_imported(file):
    allowed = {"cedarjax", "jax", "optax"} | STANDARD
    extras = (("dp_accounting", ACCOUNTING), ("jax_privacy", CORRELATED), ("tenseal", CKKS))
    for package, places in (("numpy", NUMPY), ("flax", FLAX), ("chex", CHEX), *extras):
        if file.startswith(places):
            allowed.add(package)
    assert {name.split(".")[0] for name in imports(parse(file), file)} <= allowed


def dotted(node: ast.AST) -> str:
    """`jax.config.update` for that chain of attributes, "" for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


@pytest.mark.parametrize("file", FILES)
def test_no_side_effects(file):
    tree = parse(file)
    used = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name)} | imports(tree, file)
    banned = {"jax.config", "jax.debug", "jax.pmap", "print", "open", "input", "exec", "eval"}
    if not file.startswith(JIT):
        banned |= {"jax.jit"}
    assert not {name for name in used if name in banned or name.startswith(("jax.config.", "jax.debug."))}


@pytest.mark.parametrize("module_name", MODULES)
def test_no_arrays_at_module_level(module_name):
    module = importlib.import_module(module_name)
    held: list[object] = list(vars(module).values())
    for value in list(held):
        if isinstance(value, FunctionType) and value.__module__ == module_name:
            held += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        elif isinstance(value, type) and value.__module__ == module_name:
            held += [*vars(value).values(), *getattr(value, "_field_defaults", {}).values()]
    assert not [value for leaf in held for value in jax.tree.leaves(leaf) if isinstance(value, jax.Array | np.ndarray)]


@pytest.mark.parametrize("file", FILES)
def test_a_room_holds_one_idea(file):
    assert len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("file", FILES)
def test_every_module_and_every_field_has_a_docstring(file):
    tree = parse(file)
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if not (isinstance(node, ast.ClassDef) and "NamedTuple" in map(dotted, node.bases)):
            continue
        for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign):
                described = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert described, f"{node.name}.{ast.unparse(statement.target)} has no line of docstring"


@pytest.mark.parametrize("file", TABLES)
def test_a_folder_opens_with_a_table_of_contents(file):
    docstring, *statements = parse(file).body
    assert isinstance(docstring, ast.Expr)
    names = []
    for statement in statements:
        if isinstance(statement, ast.ImportFrom):
            (alias,) = statement.names
            assert alias.asname == alias.name, f"write `import {alias.name} as {alias.name}`"
            names.append(alias.name)
        else:
            assert isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__"
            assert sorted(ast.literal_eval(statement.value)) == sorted(names)


def public(module: ModuleType) -> dict[str, object]:
    return {name: getattr(module, name) for name in getattr(module, "__all__", ())}


@pytest.mark.parametrize("module_name", [name for name in MODULES if hasattr(importlib.import_module(name), "__all__")])
def test_every_public_name_has_a_docstring(module_name):
    for name, value in public(importlib.import_module(module_name)).items():
        if not isinstance(value, FunctionType | type):
            continue
        docstring = inspect.getdoc(value) or ""
        # NamedTuple and dataclass write `Name(field, ...)` where a docstring is missing.
        assert docstring and not docstring.startswith(f"{value.__name__}("), f"{name} has no docstring"
        if isinstance(value, FunctionType) and len(inspect.signature(value).parameters) > 1:
            assert "Args:" in docstring, f"the docstring of {name} does not describe its arguments"
