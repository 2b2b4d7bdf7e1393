"""The rules of the house that neither ruff nor import-linter holds. Each is a check of one source file, or of a page about them."""

import ast
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "gadjax"
HOST_SIDE = re.compile(r"(records|section|errors|files|terminal|rows|prompts|text|server|completions|moderation)\.py|(teachers|data)/.*")
DEVICE_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "orbax"}
OTHER_TRADES = re.compile(r"(?<![a-z])(critics?|actors?|policy[ _-]?workers?)(?![a-z])", re.IGNORECASE)


class Source(NamedTuple):
    name: str  # relative to gadjax/
    text: str

    @property
    def nodes(self) -> Iterator[Any]:
        return ast.walk(ast.parse(self.text))


Check = Callable[[Source], Iterator[int]]  # the lines at fault


def roots(node: ast.AST) -> set[str]:
    """The packages that an import statement imports from; a relative import is from this one."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {"gadjax" if node.level else (node.module or "").split(".")[0]}
    return set()


def name_of(node: ast.AST) -> str:
    """`c` of the expressions `c` and `a.b.c`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def is_literal(node: ast.AST, *values: str) -> bool:
    return isinstance(node, ast.Constant) and node.value in values


def files_are_under_400_lines(source: Source) -> Iterator[int]:
    lines = source.text.count("\n")
    if lines >= 400:
        yield lines


def functions_are_under_60_lines(source: Source) -> Iterator[int]:
    for node in source.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (node.end_lineno or 0) - node.lineno + 1 >= 60:
            yield node.lineno


def packages_inits_are_empty(source: Source) -> Iterator[int]:
    if source.name.endswith("/__init__.py") and source.text.strip():
        yield 1


def the_package_is_not_imported_in_functions(source: Source) -> Iterator[int]:
    for function in source.nodes:
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if "gadjax" in roots(node):
                    yield function.lineno


def only_the_command_line_imports_by_name(source: Source) -> Iterator[int]:
    for node in source.nodes if source.name != "cli.py" else ():
        if name_of(node) in ("import_module", "resolve_name", "__import__"):
            yield node.lineno


def nothing_is_imported_for_types_only(source: Source) -> Iterator[int]:
    for node in source.nodes:
        if (isinstance(node, ast.Name) and node.id == "TYPE_CHECKING") or (
            isinstance(node, ast.Attribute) and node.attr == "TYPE_CHECKING"
        ):
            yield node.lineno


def the_host_side_does_not_import_jax(source: Source) -> Iterator[int]:
    for node in source.nodes if HOST_SIDE.fullmatch(source.name) else ():
        if roots(node) & DEVICE_LIBRARIES:
            yield node.lineno


def only_sharding_names_mesh_axes(source: Source) -> Iterator[int]:
    """`fsdp` and `tensor` are nothing but mesh axes; `data` is one where a partition or a mesh is asked for it."""
    for node in source.nodes if source.name != "sharding.py" else ():
        if isinstance(node, ast.Call) and name_of(node.func) in ("P", "PartitionSpec"):
            named = [part for argument in node.args for part in ast.walk(argument)]
        elif isinstance(node, ast.Subscript) and name_of(node.value) == "shape":
            named = [node.slice]
        else:
            named = []
        if is_literal(node, "fsdp", "tensor") or any(is_literal(part, "data") for part in named):
            yield node.lineno


def only_sharding_puts_arrays_onto_devices(source: Source) -> Iterator[int]:
    """By `put`: on several hosts `device_put` would compare what the hosts have in every call."""
    for node in source.nodes if source.name != "sharding.py" else ():
        if name_of(node) == "device_put":
            yield node.lineno


def the_fields_words_are_used(source: Source) -> Iterator[int]:
    for number, line in enumerate(source.text.splitlines(), 1):
        if OTHER_TRADES.search(line):
            yield number


def exceptions_are_not_swallowed(source: Source) -> Iterator[int]:
    for node in source.nodes:
        if isinstance(node, ast.ExceptHandler) and all(isinstance(statement, ast.Pass | ast.Continue) for statement in node.body):
            if node.type is None or any(name_of(part) in ("Exception", "BaseException") for part in ast.walk(node.type)):
                yield node.lineno


CHECKS: dict[Check, list[Source]] = {  # each with sources that it must refuse
    files_are_under_400_lines: [Source("train.py", "\n" * 400)],
    functions_are_under_60_lines: [Source("train.py", "def long():\n" + "    1\n" * 59)],
    packages_inits_are_empty: [Source("data/__init__.py", "import gadjax.data.packing")],
    the_package_is_not_imported_in_functions: [
        Source("train.py", "def late():\n    from gadjax import losses"),
        Source("train.py", "async def late():\n    import gadjax.losses as losses"),
        Source("train.py", "class A:\n    def late(self):\n        from . import losses"),
    ],
    only_the_command_line_imports_by_name: [
        Source("train.py", "import importlib\nimportlib.import_module('gadjax.losses')"),
        Source("train.py", "import pkgutil\npkgutil.resolve_name('gadjax.losses:cross_entropy')"),
        Source("train.py", "__import__('gadjax.losses')"),
    ],
    nothing_is_imported_for_types_only: [
        Source("train.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING: pass"),
        Source("train.py", "import typing\nif typing.TYPE_CHECKING: pass"),
    ],
    the_host_side_does_not_import_jax: [
        Source("records.py", "import jax.numpy as jnp"),
        Source("teachers/cache.py", "from jax import numpy"),
        Source("data/packing.py", "def late():\n    import jax"),
    ],
    only_sharding_names_mesh_axes: [
        Source("steps.py", "P(('data', 'rows'))"),
        Source("steps.py", "jax.sharding.PartitionSpec(None, 'tensor')"),
        Source("steps.py", "mesh.shape['data']"),
        Source("steps.py", "axis_name = 'fsdp'"),
    ],
    only_sharding_puts_arrays_onto_devices: [
        Source("train.py", "jax.device_put(rows, sharding)"),
        Source("steps.py", "jax.tree.map(jax.device_put, params, shardings)"),
    ],
    the_fields_words_are_used: [
        Source("train.py", "critic_loss = 0"),
        Source("train.py", "# the Actor samples"),
        Source("train.py", '"""One policy worker a host."""'),
    ],
    exceptions_are_not_swallowed: [
        Source("train.py", "try: f()\nexcept Exception: pass"),
        Source("train.py", "try: f()\nexcept (OSError, BaseException) as e: pass"),
        Source("train.py", "while f():\n    try: g()\n    except: continue"),
    ],
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_house(check: Check):
    sources = [Source(path.relative_to(PACKAGE).as_posix(), path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))]
    assert sources
    assert [f"gadjax/{source.name}:{line}" for source in sources for line in check(source)] == []


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check_refuses(check: Check):
    for source in CHECKS[check]:
        assert list(check(source)), source


def test_the_readmes_tree_has_every_file_once():
    readme = (PACKAGE.parent / "README.md").read_text()
    tree = readme[readme.index("\n    gadjax/\n") :].split("\n\n")[0] + "\n"
    lines = re.findall(r"^    +(?:\w[\w/]*/)?(\w+\.(?:py|yaml)|\w+/)(?=  |\n)", tree, re.M)
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    folders = {path.parent for path in files}
    configs = (PACKAGE.parent / "configs").glob("*.yaml")
    expected = [path.name for path in (*files, *configs)] + [f"{folder.name}/" for folder in folders]
    assert sorted(lines) == sorted([*expected, "tests/", "tpu/"])


def test_the_page_of_all_fields_is_the_classes_own():
    docs = PACKAGE.parent / "docs"
    written = runpy.run_path(str(docs / "fields.py"))["page"]()
    assert (docs / "fields.md").read_text(encoding="utf-8") == written, "write it anew: python docs/fields.py > docs/fields.md"
