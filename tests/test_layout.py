"""The house rules that no linter knows, run on this tree and on small trees that break them."""

import ast
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "models", "server", "training")
HOUSE = (*ROOMS, "benchmarks", "tests")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "models": {"models", "kernels"},
    "server": {"server", "models", "kernels"},
    "training": {"training", "models", "kernels"},
    "benchmarks": {*ROOMS, "benchmarks"},
    "tests": {*ROOMS, "benchmarks"},
}
# `rae train` and `rae eval` are the one place where the server meets training.
EXCEPTION = ("server/cli.py", "rae.training.cli")
# The HTTP process above its workers' processes: they meet in the messages alone.
SERVER_ORDER = {
    "app": 4,
    "pool": 3,
    "worker": 3,
    "supervisor": 2,
    "engine": 2,
    "messages": 1,
    "scheduler": 1,
    "runner": 1,
    "conditioning": 0,
    "request": 0,
}
TENSORS = ("torch", "torchvision", "triton", "safetensors.torch")
MAY_TOUCH_TENSORS = {
    f"server/{name}.py"
    for name in (
        "conditioning",
        "decoding",
        "descriptors",
        "devices",
        "evaluation",
        "graphs",
        "in_flight",
        "memory",
        "runner",
        "warm_up",
    )
}
MAY_TOUCH_PYDANTIC = {"server/schemas.py"}
# Names that scripts meet through transformers even though nothing here depends on them.
FOREIGN_NAMES = {"kernels"}


@dataclass(frozen=True)
class Import:
    file: str
    line: int
    module: str
    is_house_style: bool
    inside_function: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"

    @property
    def folder(self) -> str:
        return self.file.split("/")[0]

    @property
    def target(self) -> str | None:
        """The folder of this repository that is imported, or None for a library."""
        parts = self.module.split(".")
        if parts[0] == "rae":
            return parts[1] if len(parts) > 1 else None
        return parts[0] if parts[0] in ("benchmarks", "tests") else None

    def is_from(self, *packages: str) -> bool:
        return any(self.module == p or self.module.startswith(f"{p}.") for p in packages)


def own_files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")]


def packages_on_disk(root: Path) -> dict[str, Path]:
    """Folders that hold Python files; any other is data of the package above it."""
    found = {}
    for room in ROOMS:
        for folder in (root / room, *sorted((root / room).rglob("*"))):
            if folder.is_dir() and any(path.suffix == ".py" for path in own_files(folder)):
                found[".".join(("rae", *folder.relative_to(root).parts))] = folder
    return found


def data_of(package: Path) -> list[Path]:
    """What is not Python in a package's folder and in its folders that are no packages."""
    own = own_files(package)
    data = [path for path in own if path.suffix != ".py"]
    for folder in sorted(path for path in package.iterdir() if path.is_dir()):
        inner = own_files(folder)
        if folder.name != "__pycache__" and not any(path.suffix == ".py" for path in inner):
            data += data_of(folder)
    return data


def ships(pattern: str, path: Path) -> bool:
    """As setuptools matches: a star stays within one folder."""
    parts = Path(pattern).parts
    return len(parts) == len(path.parts) and all(map(fnmatch, path.parts, parts))


def python_files(root: Path, *folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]


def setuptools_table(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]


def is_module(root: Path, name: str) -> bool:
    path = root.joinpath(*name.split(".")[1:])
    return name.startswith("rae.") and (path.is_dir() or path.with_suffix(".py").is_file())


def modules_in(node: ast.AST, root: Path) -> Iterator[tuple[str, bool]]:
    """Yields (module, is_house_style); `from rae.a import b` names rae.a.b if that is a module."""
    match node:
        case ast.Import(names=names):
            for alias in names:
                top = alias.name.split(".")[0]
                yield alias.name, top != "rae" and top not in ROOMS
        case ast.ImportFrom(module=module, names=names, level=level) if level:
            yield "." * level + (module or ", ".join(alias.name for alias in names)), False
        case ast.ImportFrom(module=str(module), names=names):
            full = [f"{module}.{alias.name}" for alias in names]
            is_house_style = module != "rae" and module.split(".")[0] not in ROOMS
            for name in dict.fromkeys(name if is_module(root, name) else module for name in full):
                yield name, is_house_style
        case ast.Call(
            func=ast.Name(id=name) | ast.Attribute(attr=name),
            args=[ast.Constant(value=str(to)), *_],
        ) if name in ("import_module", "__import__"):
            yield to, True


def imports_of(root: Path, path: Path) -> Iterator[Import]:
    file = path.relative_to(root).as_posix()

    def walk(node: ast.AST, inside: bool) -> Iterator[Import]:
        for module, is_house_style in modules_in(node, root):
            yield Import(file, getattr(node, "lineno", 0), module, is_house_style, inside)
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    yield from walk(ast.parse(path.read_text()), False)


def all_imports(root: Path, *folders: str) -> list[Import]:
    return [i for path in python_files(root, *folders) for i in imports_of(root, path)]


@cache
def installed_names() -> frozenset[str]:
    return frozenset(packages_distributions()) | sys.stdlib_module_names | FOREIGN_NAMES


def packages_are_listed(root: Path) -> list[str]:
    listed, found = set(setuptools_table(root)["packages"]), set(packages_on_disk(root))
    return [f"{name}: on disk, not in pyproject.toml" for name in sorted(found - listed)] + [
        f"{name}: in pyproject.toml, not on disk" for name in sorted(listed - found)
    ]


def data_is_listed(root: Path) -> list[str]:
    globs = setuptools_table(root).get("package-data", {})
    found = packages_on_disk(root)
    return [
        f"{name}: package-data without a package" for name in sorted(set(globs) - set(found))
    ] + [
        f"{path.relative_to(root)}: no package-data pattern ships it"
        for name, folder in found.items()
        for path in data_of(folder)
        if not any(ships(pattern, path.relative_to(folder)) for pattern in globs.get(name, []))
    ]


def inits_are_where_they_belong(root: Path) -> list[str]:
    forbidden = [root / "__init__.py", *(root / folder / "__init__.py" for folder in HOUSE)]
    forbidden += [path for path in (root / "tests").rglob("__init__.py") if path not in forbidden]
    return [
        f"{path.relative_to(root)}: makes a folder shadow a library"
        for path in forbidden
        if path.exists()
    ] + [
        f"{folder.relative_to(root)}: a sub-package without __init__.py"
        for name, folder in packages_on_disk(root).items()
        if name.count(".") > 1 and not (folder / "__init__.py").exists()
    ]


def scripts_shadow_nothing(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}: named like an installed package"
        for path in python_files(root, "benchmarks", "tests")
        if path.stem in installed_names()
    ]


def imports_are_absolute(root: Path) -> list[str]:
    return [
        f"{i}: say `from rae.<folder>...`"
        for i in all_imports(root, *HOUSE)
        if not i.is_house_style
    ]


def layers_are_kept(root: Path) -> list[str]:
    imports = all_imports(root, *HOUSE)
    excepted = [i for i in imports if (i.file, i.module) == EXCEPTION and i.inside_function][:1]
    return [
        f"{i}: against the layers"
        for i in imports
        if i.target is not None and i.target not in MAY_IMPORT[i.folder] and i not in excepted
        # Types of fixtures: such a line is under TYPE_CHECKING, as no tests are on sys.path.
        if not (i.folder == "tests" and i.module.endswith(".conftest"))
    ]


def server_order_is_kept(root: Path) -> list[str]:
    ranks = {f"server/{name}.py": rank for name, rank in SERVER_ORDER.items()}
    return [
        f"{i}: the order is {', '.join(SERVER_ORDER)}"
        for i in all_imports(root, "server")
        for name, rank in SERVER_ORDER.items()
        if i.file in ranks and i.is_from(f"rae.server.{name}") and rank >= ranks[i.file]
    ]


def server_keeps_libraries_in_their_files(root: Path) -> list[str]:
    return [
        f"{i}: only {', '.join(sorted(allowed))} may"
        for i in all_imports(root, "server")
        for packages, allowed in ((TENSORS, MAY_TOUCH_TENSORS), (("pydantic",), MAY_TOUCH_PYDANTIC))
        if i.is_from(*packages) and i.file not in allowed
    ]


Rule = Callable[[Path], list[str]]
RULES: tuple[Rule, ...] = (
    packages_are_listed,
    data_is_listed,
    inits_are_where_they_belong,
    scripts_shadow_nothing,
    imports_are_absolute,
    layers_are_kept,
    server_order_is_kept,
    server_keeps_libraries_in_their_files,
)
SOUND = {
    "pyproject.toml": """
        [tool.setuptools]
        packages = ["rae.kernels", "rae.models", "rae.models.data", "rae.server", "rae.training"]
        package-data = { "rae.models.data" = ["*.json"] }
        """,
    "kernels/fused.py": "import torch",
    "models/net.py": "import torch\nfrom rae.kernels.fused import run",
    "models/data/__init__.py": "",
    "models/data/labels.json": "[]",
    "server/cli.py": "def train():\n    from rae.training.cli import main",
    "server/app.py": "from rae.server import engine, schemas",
    "server/engine.py": "from rae.server import request, runner, scheduler",
    "server/runner.py": "import torch\nfrom rae.models.net import Net",
    "server/scheduler.py": "from rae.server.request import Request",
    "server/request.py": "",
    "server/schemas.py": "import pydantic",
    "training/cli.py": "from rae.models import net",
    "benchmarks/ops.py": "from rae.training.cli import main",
    "tests/models/test_net.py": "from rae.models.net import Net\nfrom benchmarks.ops import main",
}
UNSOUND: list[tuple[Rule, dict[str, str], str]] = [
    (packages_are_listed, {"server/web/__init__.py": ""}, "rae.server.web: on disk"),
    (data_is_listed, {"models/data/sizes/a.json": "{}"}, "sizes/a.json: no package-data"),
    (data_is_listed, {"models/data/net.safetensors": ""}, "net.safetensors: no package-data"),
    (data_is_listed, {"server/logo.png": ""}, "server/logo.png: no package-data"),
    (inits_are_where_they_belong, {"__init__.py": ""}, "__init__.py: makes"),
    (inits_are_where_they_belong, {"models/__init__.py": ""}, "models/__init__.py: makes"),
    (inits_are_where_they_belong, {"benchmarks/__init__.py": ""}, "benchmarks/__init__.py: makes"),
    (inits_are_where_they_belong, {"tests/models/__init__.py": ""}, "tests/models/__init__.py"),
    (inits_are_where_they_belong, {"server/web/page.py": ""}, "server/web: a sub-package"),
    (scripts_shadow_nothing, {"benchmarks/kernels.py": ""}, "benchmarks/kernels.py"),
    (scripts_shadow_nothing, {"benchmarks/numpy.py": ""}, "benchmarks/numpy.py"),
    (scripts_shadow_nothing, {"tests/server/queue.py": ""}, "tests/server/queue.py"),
    (imports_are_absolute, {"models/a.py": "from . import net"}, "models/a.py:1 imports .net"),
    (imports_are_absolute, {"models/a.py": "from .net import Net"}, "imports .net"),
    (imports_are_absolute, {"models/a.py": "from models.net import Net"}, "imports models.net"),
    (imports_are_absolute, {"models/a.py": "import rae.models.net"}, "imports rae.models.net"),
    (imports_are_absolute, {"models/a.py": "from rae import models"}, "imports rae.models"),
    (layers_are_kept, {"kernels/a.py": "from rae.models.net import Net"}, "kernels/a.py:1"),
    (layers_are_kept, {"models/a.py": "from rae.server.app import app"}, "models/a.py:1"),
    (layers_are_kept, {"models/a.py": "from rae.training.cli import main"}, "models/a.py:1"),
    (layers_are_kept, {"training/a.py": "from rae.server.app import app"}, "training/a.py:1"),
    (layers_are_kept, {"server/a.py": "def f():\n    from rae.training import cli"}, "a.py:2"),
    (layers_are_kept, {"server/a.py": "import_module('rae.training.cli')"}, "server/a.py:1"),
    (layers_are_kept, {"server/cli.py": "from rae.training.cli import main"}, "server/cli.py:1"),
    (
        layers_are_kept,
        {"server/cli.py": "def f():\n    from rae.training.ema import Ema"},
        "cli.py:2",
    ),
    (
        layers_are_kept,
        {"server/cli.py": SOUND["server/cli.py"] + "\n    from rae.training.cli import other"},
        "server/cli.py:3",
    ),
    (layers_are_kept, {"models/a.py": "from benchmarks.ops import main"}, "imports benchmarks.ops"),
    (layers_are_kept, {"benchmarks/a.py": "from tests.b import c"}, "imports tests.b"),
    (layers_are_kept, {"tests/test_a.py": "import tests.b"}, "imports tests.b"),
    (server_order_is_kept, {"server/runner.py": "from rae.server import scheduler"}, "runner.py:1"),
    (
        server_order_is_kept,
        {"server/request.py": "from rae.server.engine import E"},
        "request.py:1",
    ),
    (server_order_is_kept, {"server/pool.py": "from rae.server.worker import W"}, "pool.py:1"),
    (server_keeps_libraries_in_their_files, {"server/cli.py": "import torch"}, "server/cli.py:1"),
    (
        server_keeps_libraries_in_their_files,
        {"server/worker.py": "def f():\n    from torch.cuda import Stream"},
        "server/worker.py:2",
    ),
    (
        server_keeps_libraries_in_their_files,
        {"server/app.py": "from pydantic import Field"},
        "app.py:1",
    ),
]


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_this_tree_keeps(rule: Rule) -> None:
    assert rule(ROOT) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_sound_tree_keeps(rule: Rule, tmp_path: Path) -> None:
    write_tree(tmp_path, SOUND)
    # An empty folder is no file in git and so breaks nothing.
    (tmp_path / "server" / "left_over" / "__pycache__").mkdir(parents=True)
    assert rule(tmp_path) == []


@pytest.mark.parametrize(("rule", "files", "complaint"), UNSOUND)
def test_an_unsound_tree_is_refused(
    rule: Rule, files: dict[str, str], complaint: str, tmp_path: Path
) -> None:
    write_tree(tmp_path, SOUND | files)
    complaints = rule(tmp_path)
    assert len(complaints) == 1, complaints
    assert complaint in complaints[0]


def test_a_listed_package_that_is_gone_is_refused(tmp_path: Path) -> None:
    write_tree(tmp_path, SOUND)
    (tmp_path / "models/data/__init__.py").unlink()
    (tmp_path / "models/data/labels.json").unlink()
    assert packages_are_listed(tmp_path) == ["rae.models.data: in pyproject.toml, not on disk"]
    assert data_is_listed(tmp_path) == ["rae.models.data: package-data without a package"]
