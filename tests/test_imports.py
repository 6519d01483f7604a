"""Who may import whom: the layers of the package, read from the syntax tree of every module.

    config <- msa, ops <- model <- checkpoint <- (engine, train) <- serve <- cli, terminal

`msa` and `ops` import nothing of the package, `processing` only `config`. Imports for type checking count too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "openm3"
NETWORK = {"config", "msa", "ops", "model"}
MAY_IMPORT = {
    "config": set(),
    "msa": set(),
    "ops": set(),
    "processing": {"config"},
    "model": {"config", "msa", "ops"},
    "checkpoint": NETWORK,
    "parallel": NETWORK | {"checkpoint"},
    "engine": NETWORK | {"checkpoint", "processing"},
    "train": NETWORK | {"checkpoint", "processing", "engine"},  # the engine answers the examination's questions
    "serve": NETWORK | {"checkpoint", "processing", "engine"},
    "terminal": NETWORK | {"checkpoint", "processing", "engine"},
    "cli": NETWORK | {"checkpoint", "processing", "engine", "train", "serve", "terminal"},
    "integrations": NETWORK | {"checkpoint", "processing", "engine", "train", "serve", "parallel"},
}
# M3Config.from_pretrained takes a model's name, which the checkpoint room resolves.
EXCEPTIONS = {("config.py", "from_pretrained", "checkpoint")}
HEAVY = {"torch", "numpy", "PIL", "av", "rich", "jinja2", "tokenizers", "huggingface_hub", "safetensors",
         "transformers", "sklearn", "matplotlib", "typer"}  # fmt: skip
OPTIONAL = {"sklearn", "matplotlib"}  # come with an extra: never needed to import a module


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, str, int]]:
    """(function it stands in or "", full name of what is imported, line) of every import."""
    found: list[tuple[str, str, int]] = []
    package = ["openm3", *path.relative_to(ROOT).parts[:-1]]

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.Import):
            found.extend((function, alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            name = ".".join(part for part in (base, node.module) if part)
            found.extend((function, f"{name}.{alias.name}", node.lineno) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(path.read_text(encoding="utf-8")), "")
    return found


def rooms_imported(path: Path) -> list[tuple[str, str, int]]:
    """(function, room, line) of the imports from the package."""
    return [
        (function, name.split(".")[1], line) for function, name, line in imports(path) if name.startswith("openm3.")
    ]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_room_may(path):
    room = room_of(path)
    assert room in MAY_IMPORT, f"{room}: say in this test whom the new room may import"
    file = str(path.relative_to(ROOT))
    wrong = [
        f"{file}:{line} imports openm3.{other}"
        for function, other, line in rooms_imported(path)
        if other not in MAY_IMPORT[room] | {room, "__version__"} and (file, function, other) not in EXCEPTIONS
    ]
    assert not wrong


def test_the_rule_is_not_vacuous():
    """The reader of imports sees what is there: relative ones, those in functions, those for type checking."""
    seen = {(room_of(path), other) for path in modules() for _, other, _ in rooms_imported(path)}
    assert {("model", "msa"), ("engine", "model"), ("engine", "processing"), ("terminal", "engine")} <= seen
    assert [e for e in EXCEPTIONS if (e[1], e[2]) in {(f, r) for f, r, _ in rooms_imported(ROOT / e[0])}] == [
        *EXCEPTIONS
    ]


def test_layers_have_no_cycle():
    order: list[str] = []
    while len(order) < len(MAY_IMPORT):
        free = [room for room, others in MAY_IMPORT.items() if room not in order and others <= set(order)]
        assert free, f"a cycle among {set(MAY_IMPORT) - set(order)}"
        order += free


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_optional_dependencies_are_imported_where_they_are_used(path):
    top = [f"{name} in line {line}" for function, name, line in imports(path)
           if not function and name.split(".")[0] in OPTIONAL]  # fmt: skip
    assert not top


@pytest.mark.parametrize("statement", [
    "import openm3", "import openm3.processing", "from openm3.engine import SamplingParams",
    "import openm3; openm3.M3Config.from_pretrained('openm3-nano')", "from openm3.checkpoint import resolve",
])  # fmt: skip
def test_cheap_imports_stay_cheap(statement):
    code = f"{statement}; import sys; print(*sorted(set(sys.modules) & {HEAVY - {'typer'}!r}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stderr


def test_the_command_line_starts_without_the_heavy_libraries():
    code = f"import openm3.cli, sys; print(*sorted(set(sys.modules) & {HEAVY - {'typer', 'rich'}!r}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stderr
