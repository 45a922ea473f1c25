"""The docs are true: commands parse, make targets, Python names and links exist, the layout is the real one."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from test_imports import ROOMS

from edgeprune import targets
from edgeprune.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [ROOT / "edgeprune" / "demo" / "assets" / "teacher" / "README.md"]


def blocks(page: Path, *kinds: str) -> list[str]:
    """The code blocks of a page of these kinds."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    return [text for kind, text in found if kind in kinds]


def typed(page: Path, program: str) -> list[str]:
    """Commands of a program in a page's console blocks, without prompt and comment; lines ending in \\ are joined."""
    lines = "\n".join(blocks(page, "console", "bash", "sh")).replace("\\\n", " ").splitlines()
    return [line for line in (raw.strip().removeprefix("$ ") for raw in lines) if line.split(" ")[0] == program]


def parse(command: Any, words: list[str], parent: Any = None) -> None:
    """Parse as the command line does, options of sub-commands included, without running anything."""
    context = command.make_context(command.name, words, parent=parent)
    # Newer typers carry a click of their own: no class to import holds for every version.
    if hasattr(command, "resolve_command") and (rest := [*context._protected_args, *context.args]):
        _, sub, left = command.resolve_command(context, rest)
        assert sub is not None
        parse(sub, left, context)


GROUPS = [app, *(group.typer_instance for group in app.registered_groups)]
EXAMPLES = [
    example.strip()
    for group in GROUPS
    for info in group.registered_commands
    for example in (info.epilog or "").removeprefix("Example: ").split("·")
    if example.strip()
]
COMMANDS = sorted({c for page in PAGES for c in typed(page, "edgeprune")} | set(EXAMPLES))


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("line", COMMANDS)
def test_command_parses(line: str) -> None:
    words = shlex.split(line, comments=True)
    parse(typer.main.get_command(app), words[1:])


def test_a_wrong_command_does_not_parse() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(typer.main.get_command(app), ["export", "small", "--tarGet", "onnx", "-o", "x"])


@pytest.mark.parametrize("name", targets.names())
def test_every_device_has_a_page_of_steps(name: str) -> None:
    page = ROOT / "docs" / "devices" / f"{name}.md"
    commands = typed(page, "edgeprune")
    assert any(line.startswith("edgeprune compress") and f"--fit {name}" in line for line in commands)
    exports = [line for line in commands if line.startswith("edgeprune export") and f"--device {name} " in line]
    assert any(f"--target {fmt}" in line for line in exports for fmt in targets.load(name).formats)
    device, text = targets.load(name), page.read_text("utf-8")
    assert "## Never executed" in text
    assert device.requires in text and device.memory_source in text
    assert f"in {device.memory_bytes / 1e9:g} GB:" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_make_targets_are_there(page: Path) -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    said = {w for line in typed(page, "make") for w in shlex.split(line, comments=True)[1:] if "=" not in w}
    assert said <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_name_what_exists(page: Path) -> None:
    for text in blocks(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("edgeprune"):
                module = importlib.import_module(str(node.module))
                missing = [a.name for a in node.names if not hasattr(module, a.name)]
                assert all(importlib.util.find_spec(f"{node.module}.{name}") for name in missing)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_local_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
        assert "://" in link or (page.parent / link).exists(), link


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_headings_lead_somewhere(page: Path) -> None:
    for file, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text("utf-8")):
        if "://" not in file:
            assert anchor in headings(page.parent / file if file else page), f"{file}#{anchor}"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 200


def test_the_index_lists_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link).resolve() for link in re.findall(r"\]\(([^)#\s]+)\)", index.read_text("utf-8"))}
    pages = {page for page in (ROOT / "docs").rglob("*.md") if page != index}
    assert pages - linked == set()


def diagram(page: Path) -> list[tuple[str, ...]]:
    """Return the rows of rooms in the layout diagram; a line without a number continues the row above."""
    rows: list[tuple[str, ...]] = []
    for line in blocks(page, "text")[0].splitlines():
        match = re.fullmatch(r" *(\d*) +(\w+) {2,}\S.*", line)
        assert match is not None and match[1] in ("", str(len(rows) + 1)), line
        if match[1]:
            rows.append((match[2],))
        else:
            rows[-1] += (match[2],)
    return rows


def test_the_layout_is_the_list_of_rooms() -> None:
    assert diagram(ROOT / "CONTRIBUTING.md") == ROOMS


def test_every_call_that_was_never_executed_is_listed() -> None:
    """Names of what needs hardware, read from the sources; their own names (`_launch`) are not calls of a vendor."""
    page = (ROOT / "docs" / "never-executed.md").read_text("utf-8")
    patterns = {
        "gpu.py": r"\b(cuda[A-Z]\w+|nvml[A-Z]\w+)",
        "trt.py": r"_(?:engine|context|runtime)\.(\w+)",
        "eager.py": r"\bcuda\.(\w*memory\w+)",
        "coreml.py": r"coremltools\.([\w.]+)\(",
        "memory.py": r"\b(proc_pid_rusage|peak_wset|getrusage)\b",
        "providers.py": r"\"(\w+ExecutionProvider)\"",
    }
    for file, pattern in patterns.items():
        found = set(re.findall(pattern, (ROOT / "runtimes" / file).read_text("utf-8")))
        run_here = {"CPUExecutionProvider", "utils.load_spec"}
        missing = {name for name in found - run_here if name not in page}
        assert found and not missing, (file, missing)
