"""What imports what, and what an import costs.

A room is a folder of edgeprune. Imports go one way: a room imports rooms of earlier rows only, and rooms of one row do
not know each other. Imports inside functions count too, and so do those under TYPE_CHECKING. The package's own lazy
`load` is free, since it is the public door; `distill` is the door for launchers.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ROOMS: list[tuple[str, ...]] = [
    ("common",),
    ("targets", "shapes"),
    ("families",),
    ("residency",),
    ("sampling", "quantization", "analysis"),
    ("planning",),
    ("artefact",),
    ("data",),
    ("training",),
    ("runtimes",),
    ("export", "reference"),
    ("metrics",),
    ("stages",),
    ("bench", "tuning", "verify"),
    ("report",),
    ("api",),
    ("compare",),
    ("experiments", "demo", "user_study"),
    ("cli",),
    ("distill",),
]
DOOR = "edgeprune"


def modules() -> dict[str, Path]:
    """Every module of the packages by its import name."""
    out = {}
    for name, folder in {
        "edgeprune": ROOT / "edgeprune",
        **{f"edgeprune.{n}": ROOT / n for n in ("export", "runtimes", "targets")},
    }.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            out[".".join((name, *(p for p in parts if p != "__init__")))] = path
    return out


def imported(name: str, path: Path, known: set[str], tree: ast.AST | None = None) -> set[str]:
    """The modules of ours that a file imports, wherever in the file."""
    base = name if path.name == "__init__.py" else name.rpartition(".")[0]
    out = set()
    for node in ast.walk(tree or ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = base.split(".")[: len(base.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*package, *([node.module] if node.module else [])])
            # `from edgeprune import plan` takes a module, `from edgeprune.planning.plan import Plan` a name of one.
            out |= {full if (full := f"{origin}.{alias.name}") in known else origin for alias in node.names}
    return {found for found in out if found == DOOR or found.startswith(f"{DOOR}.")}


def room(name: str) -> str:
    """The room of a module."""
    return name.removeprefix(f"{DOOR}.").partition(".")[0]


def steps_back(imports: dict[str, set[str]]) -> list[str]:
    """Imports of a room in the same or a later row."""
    row = {room: place for place, rooms in enumerate(ROOMS) for room in rooms}
    return [
        f"{name} imports {other}"
        for name, others in sorted(imports.items())
        for other in sorted(others)
        if DOOR not in (name, other) and room(name) != room(other) and row[room(other)] >= row[room(name)]
    ]


def test_imports_go_one_way() -> None:
    known = modules()
    imports = {name: imported(name, path, set(known)) for name, path in known.items()}
    assert len(known) > 10 and "edgeprune.common.errors" in imports["edgeprune.targets"]
    assert steps_back(imports) == []


def test_every_module_is_in_a_room() -> None:
    listed = [room for row in ROOMS for room in row]
    assert sorted(listed) == sorted({room(name) for name in modules() if name != DOOR})


@pytest.mark.parametrize(
    "line",
    [
        "import edgeprune.cli",
        "from edgeprune import cli",
        "from edgeprune.cli import main",
        "from . import cli",
        "from .cli import main",
        "def f():\n    from edgeprune import cli as x",
    ],
)
def test_a_step_back_is_seen(line: str) -> None:
    found = imported("edgeprune.planning", Path("planning.py"), {"edgeprune.cli"}, ast.parse(line))
    assert steps_back({"edgeprune.planning": found}) == ["edgeprune.planning imports edgeprune.cli"]
    assert steps_back({"edgeprune.cli": {"edgeprune.planning"}}) == []
    assert steps_back({"edgeprune.shapes": {"edgeprune.targets.toml"}}) != []  # rooms of one row


def test_no_module_is_named_like_a_vendor() -> None:
    vendors = {
        "onnx",
        "torch",
        "cuda",
        "numpy",
        "coremltools",
        "openvino",
        "tensorrt",
        "nncf",
        "diffusers",
        "transformers",
    }
    # runtimes/openvino.py refuses any other name than its own: test_openvino.py.
    assert {path.stem for path in modules().values()} & vendors == {"openvino"}


HEAVY = ("torch", "diffusers", "transformers", "nncf", "accelerate", "onnxruntime", "openvino", "scipy", "matplotlib")

HELP = """
import sys
sys.argv = ["edgeprune", "--help"]
from edgeprune.cli import main
try: main()
except SystemExit: pass
"""


def loaded_by(code: str) -> set[str]:
    """Top-level packages in sys.modules of a fresh interpreter after `code`."""
    code += "\nimport sys, json; print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules})))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests")
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout.splitlines()[-1]))


def light(package: str) -> list[str]:
    return [m for m in modules() if m.startswith(f"edgeprune.{package}") and m != "edgeprune.runtimes.eager"]


@pytest.mark.parametrize("package", ["runtimes", "targets"])
def test_device_side_never_imports_torch(package: str) -> None:
    # A runtime's vendor may be absent here; what matters is what was loaded until then.
    tries = "\n".join(f"try: import {m}\nexcept (ImportError, EdgepruneError): pass" for m in light(package))
    assert not loaded_by(f"from edgeprune.common.errors import EdgepruneError\n{tries}") & {
        "torch",
        "diffusers",
        "transformers",
    }


def test_device_side_names_no_torch() -> None:
    """The same by reading: an import inside a function, which the subprocess does not run, counts too."""
    for name in [*light("runtimes"), *light("targets")]:
        tree = ast.parse(modules()[name].read_text("utf-8"))
        names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {n.partition(".")[0] for n in names} & {"torch", "diffusers", "transformers"}, name


def test_the_probe_sees_torch() -> None:
    pytest.importorskip("torch")
    assert "torch" in loaded_by("import edgeprune.quantization.int4")


def test_import_edgeprune_loads_nothing_heavy() -> None:
    assert not loaded_by("import edgeprune; edgeprune.__version__") & set(HEAVY)


def test_the_api_loads_nothing_heavy() -> None:
    """Its functions are there before torch, so that they can refuse a wrong path at once."""
    code = "from edgeprune import api; api.compress; api.prune; api.PlanOptions; api.GenerationOptions"
    assert not loaded_by(code) & set(HEAVY)


def test_a_models_folder_is_found_without_torch() -> None:
    """So a folder that does not exist is refused at once, also by verbs that need torch later."""
    assert not loaded_by("import edgeprune.artefact.resolve") & set(HEAVY)


def test_cli_loads_nothing_heavy_for_help() -> None:
    assert not loaded_by(HELP) & set(HEAVY)


def modules_loaded(code: str) -> int:
    """How many modules a fresh interpreter holds after `code`; counted, since seconds are another machine's."""
    code += "\nimport sys; print(len(sys.modules), file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests")
    assert run.returncode == 0, run.stderr
    return int(run.stderr.splitlines()[-1])


TYPER = "import typer, rich.console, typer.rich_utils, typer.testing"


def test_start_imports_little() -> None:
    """`edgeprune --help` imports Typer and modules of its own; `import edgeprune` imports nearly nothing."""
    bare, alone, shown, typer = (modules_loaded(code) for code in ("", "import edgeprune", HELP, TYPER))
    assert alone - bare < 110, (bare, alone)
    assert shown - typer < 100, (typer, shown)


def test_a_heavy_start_is_seen() -> None:
    assert modules_loaded("import edgeprune, numpy, asyncio") - modules_loaded("") > 120
