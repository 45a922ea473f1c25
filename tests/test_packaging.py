"""The package list, the wheel, and the wheel in an environment that has no torch."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
MAPPED = PROJECT["tool"]["setuptools"]["package-dir"]
EXTRAS = PROJECT["project"]["optional-dependencies"]


def packages_in_tree(root: Path) -> set[str]:
    """Import names of all folders with Python files: those of edgeprune/, and the mapped ones."""
    out = {
        ".".join(path.parent.relative_to(root).parts)
        for path in (root / "edgeprune").rglob("*.py")
        if "assets" not in path.parts
    }
    for name, folder in MAPPED.items():
        for path in (root / folder).rglob("*.py"):
            out.add(".".join([name, *path.parent.relative_to(root / folder).parts]))
    return out


def test_package_list_equals_tree() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(packages_in_tree(ROOT))
    assert len(set(listed)) == len(listed)


def test_a_forgotten_package_is_seen(tmp_path: Path) -> None:
    for folder in ("edgeprune/metrics/new", "export", "runtimes/deep"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file.py").touch()
    assert packages_in_tree(tmp_path) == {"edgeprune.metrics.new", "edgeprune.export", "edgeprune.runtimes.deep"}


def requirement(line: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", line)
    assert found
    return found.group().lower()


def test_base_install_is_what_a_device_needs() -> None:
    base = {requirement(line) for line in PROJECT["project"]["dependencies"]}
    assert base == {"numpy", "pillow", "psutil", "rich", "safetensors", "tokenizers", "tomli", "typer"}


def test_extras_cover_the_users_list() -> None:
    names = {requirement(line) for lines in EXTRAS.values() for line in lines}
    assert names >= {
        *("torch", "diffusers", "transformers", "accelerate", "nncf", "datasets", "optimum", "onnx", "onnxscript"),
        *("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu12", "coremltools", "openvino"),
    }


def test_constraints_pin_what_make_installs() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][\w.]*", line) for line in lines), lines
    pinned = {requirement(line) for line in lines}
    tested = ("compress", "onnx", "openvino", "coreml", "trt-rtx", "dev")  # what the Makefile installs
    asked = PROJECT["project"]["dependencies"] + [need for extra in tested for need in EXTRAS[extra]]
    assert {requirement(line) for line in asked if "python_version" not in line} <= pinned
    assert not [name for name in pinned if name.startswith("nvidia") and name != "nvidia-ml-py"]  # it holds no CUDA


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built in a copy of the tree, so that no build/lib of an earlier state gets in."""
    pytest.importorskip("build")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "edgeprune", *MAPPED.values()):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (found,) = out.glob("*.whl")
    return found


def test_wheel_holds_every_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = {"edgeprune": ROOT / "edgeprune", **{f"edgeprune/{f}": ROOT / f for f in MAPPED.values()}}
    expected = {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file()
        and (
            path.suffix in {".py", ".j2"} or "assets" in path.parts or path.name == "py.typed" or path.suffix == ".toml"
        )
    }
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert "edgeprune/targets/cpu-x86.toml" in names and "edgeprune/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {"edgeprune", f"edgeprune-{version('edgeprune')}.dist-info"}


def test_wheel_says_what_it_is(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"edgeprune-{version('edgeprune')}.dist-info"
    meta = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    assert (meta["Name"], meta["License-Expression"]) == ("edgeprune", "Apache-2.0")
    assert "edgeprune = edgeprune.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert f"{info}/licenses/LICENSE" in archive.namelist()


def link_base_install(into: Path) -> None:
    """Link what `pip install edgeprune` would bring, with all that needs in turn and nothing else, into a folder."""
    into.mkdir()
    waiting, seen = list(PROJECT["project"]["dependencies"]), set()
    while waiting:
        need = Requirement(waiting.pop())
        if need.name in seen or (need.marker and not need.marker.evaluate({"extra": ""})):
            continue
        seen.add(need.name)
        found = distribution(need.name)
        waiting += found.requires or []
        for top in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (into / top).exists():
                (into / top).symlink_to(found.locate_file(top))


PROBE = """
import importlib.util, sys
import edgeprune, edgeprune.errors, edgeprune.runtimes, edgeprune.targets
assert edgeprune.__version__ == {version!r}, edgeprune.__version__
assert edgeprune.__file__.startswith({site!r}), edgeprune.__file__
assert edgeprune.targets.__file__.startswith({site!r}), edgeprune.targets.__file__
assert "ort" in edgeprune.targets.load("cpu-x86").runtimes
for name in ("torch", "diffusers", "transformers", "scipy", "export", "runtimes", "targets", "tests"):
    assert importlib.util.find_spec(name) is None, name
try:
    edgeprune.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
sys.argv = ["edgeprune", "--help"]
from edgeprune.cli import main
sys.exit(main())
"""


def test_wheel_in_an_environment_without_torch(wheel: Path, tmp_path: Path) -> None:
    site, base = tmp_path / "site", tmp_path / "base"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site)]
    installed = subprocess.run([*command, str(wheel)], capture_output=True, text=True)
    assert installed.returncode == 0, installed.stderr
    link_base_install(base)
    # -I -S: no site-packages, no editable finder, no current folder; so neither torch nor this tree can be found.
    code = f"import sys; sys.path[:0] = [{str(site)!r}, {str(base)!r}]\n"
    code += PROBE.format(version=version("edgeprune"), site=str(site))
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "compress" in run.stdout
