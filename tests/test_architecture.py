"""The floors of docs/architecture.md, read from its table and held against the imports."""

import ast
import re
from pathlib import Path

import pytest

import lightning_dvc

PACKAGE = Path(lightning_dvc.__file__).parent
PAGE = Path(__file__).parent.parent / "docs" / "architecture.md"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# Modules that the page does not list: what users see, and what the build reads.
TOP, BOTTOM = "__init__.py", "version.py"

MAY_IMPORT_LIGHTNING = {
    "bars.py",
    "callback.py",
    "datamodule.py",
    "trainer_bridge.py",
    "wrapping.py",
    "capture/objective.py",
    "capture/guard.py",
    "capture/probe.py",
}
LIGHTNING = {"lightning", "lightning_fabric", "pytorch_lightning"}


def floors_in(markdown):
    """Floor of each file ``x.py`` or folder ``x/`` that the first column pair of a table names."""
    floors = {}
    for floor, names in re.findall(r"^\|\s*(\d+)\s*\|([^|]*)\|", markdown, re.MULTILINE):
        for name in names.split(","):
            name = name.strip().strip("`")
            assert re.fullmatch(r"[\w/]+(\.py|/)", name), f"neither x.py nor x/: {name!r}"
            assert name not in floors, f"{name} is in the table twice"
            floors[name] = int(floor)
    return floors


def floor_of(module, floors):
    """Floor of a module: its own row, else that of the innermost folder; None without a row."""
    if module in (TOP, BOTTOM):
        return max(floors.values()) if module == TOP else 0
    parents = [f"{parent.as_posix()}/" for parent in Path(module).parents]
    return next((floors[name] for name in [module, *parents] if name in floors), None)


def imports_of(source, module, modules):
    """What a module imports, also inside functions: modules of the package, and other packages.

    Modules of the package are given by their paths in it, others by their first name.
    """
    ours, others = set(), set()
    for node in ast.walk(ast.parse(source)):
        for name in _imported_names(node, module):
            first, *rest = name.split(".")
            if first == PACKAGE.name:
                ours.add(_file_of(rest, modules))
            else:
                others.add(first)
    return ours, others


def _imported_names(node, module):
    """Dotted names, each one a module or something in a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = [node.module] if node.module else []
    if node.level:
        parents = [PACKAGE.name, *Path(module).parent.parts]
        base = parents[: len(parents) + 1 - node.level] + base
    return [".".join([*base, alias.name]) for alias in node.names]


def _file_of(parts, modules):
    """The module that holds a name: the longest prefix that is a file or a folder."""
    for n in range(len(parts), 0, -1):
        path = "/".join(parts[:n])
        for file in (f"{path}.py", f"{path}/__init__.py"):
            if file in modules:
                return file
    return TOP


FLOORS = floors_in(PAGE.read_text(encoding="utf-8"))


def imports(module):
    return imports_of((PACKAGE / module).read_text(encoding="utf-8"), module, MODULES)


def test_rows_name_files_and_folders_that_exist():
    missing = [name for name in FLOORS if name not in MODULES and not name.endswith("/")]
    folders = [name for name in FLOORS if name.endswith("/")]
    missing += [name for name in folders if not any(m.startswith(name) for m in MODULES)]
    assert missing == []


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_floor_and_imports_nothing_from_above(module):
    floor = floor_of(module, FLOORS)
    assert floor is not None, f"{module} is in no row of {PAGE.name}"
    ours, _ = imports(module)
    listed = {other: floor_of(other, FLOORS) for other in ours}
    above = {other: there for other, there in listed.items() if there is None or there > floor}
    assert above == {}, f"{module} is on floor {floor}"


def test_lightning_is_imported_only_where_it_may_be():
    using = {module for module in MODULES if imports(module)[1] & LIGHTNING}
    assert using <= MAY_IMPORT_LIGHTNING
    assert "capture/objective.py" in using  # the search finds what is there


# -- the reading of the page and of imports, on planted cases


def test_reads_files_folders_and_lists_from_a_table():
    page = "\n".join(
        [
            "| floor | module | job |",
            "|---|---|---|",
            "| 2 | `top.py` | uses `low.py`, `other.py` |",
            "| 1 | `a.py`, `b/`, `low/special.py` | x |",
            "| 0 | `low/` | y |",
        ]
    )
    floors = floors_in(page)
    assert floors == {"top.py": 2, "a.py": 1, "b/": 1, "low/special.py": 1, "low/": 0}
    assert floor_of("b/deep/x.py", floors) == 1
    assert floor_of("low/special.py", floors) == 1
    assert floor_of("low/other.py", floors) == floor_of("low/__init__.py", floors) == 0
    assert floor_of("new.py", floors) is None
    assert floor_of(TOP, floors) == 2


@pytest.mark.parametrize("row", ["| 1 | `a` | x |", "| 1 | `a.py` and more | x |"])
def test_a_row_that_names_no_module_is_refused(row):
    with pytest.raises(AssertionError, match=r"neither x\.py"):
        floors_in(row)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("import lightning_dvc.pools", {"pools.py"}),
        ("import lightning_dvc.policy.bandit as b, lightning_dvc", {"policy/bandit.py", TOP}),
        ("from lightning_dvc.pools import Pools", {"pools.py"}),
        ("from lightning_dvc import pools, __version__", {"pools.py", TOP}),
        (
            "from lightning_dvc.policy import bandit, rule",
            {"policy/bandit.py", "policy/__init__.py"},
        ),
        ("from . import bandit", {"policy/bandit.py"}),
        ("from .bandit import SourceBandit", {"policy/bandit.py"}),
        ("from .. import pools", {"pools.py"}),
        ("from ..pools import Pools", {"pools.py"}),
        ("def f():\n    from lightning_dvc.pools import Pools", {"pools.py"}),
        ("if TYPE_CHECKING:\n    import lightning_dvc.pools", {"pools.py"}),
        ("from lightning.pytorch import Trainer\nimport torch.nn", set()),
    ],
)
def test_finds_every_form_of_import(statement, expected):
    modules = [TOP, "pools.py", "policy/__init__.py", "policy/bandit.py"]
    ours, others = imports_of(statement, "policy/rule.py", modules)
    assert ours == expected
    assert others == ({"lightning", "torch"} if not expected else set())
