"""The package list, the wheel, and the wheel in an environment that has no torch."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import Distribution, distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image
from studies import image_folders

from edgeprune import export, metrics, runtimes
from edgeprune.common import extras

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
        *(
            "torch",
            "diffusers",
            "transformers",
            "accelerate",
            "deepspeed",
            "nncf",
            "datasets",
            "optimum",
            "onnx",
            "onnxscript",
        ),
        *("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu12", "coremltools", "openvino"),
    }


def test_constraints_pin_what_make_installs() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][\w.]*", line) for line in lines), lines
    pinned = {requirement(line) for line in lines}
    tested = ("compress", "gguf", "onnx", "openvino", "coreml", "trt-rtx", "dev")  # what the Makefile installs
    asked = PROJECT["project"]["dependencies"] + [need for extra in tested for need in EXTRAS[extra]]
    assert {requirement(line) for line in asked if "python_version" not in line} <= pinned
    assert not [name for name in pinned if name.startswith("nvidia") and name != "nvidia-ml-py"]  # it holds no CUDA


NOT_RUN = {
    "deepspeed": "compiles its kernels where it is installed",
    "onnxruntime-gpu": "needs a GPU, and excludes onnxruntime",
    "tensorrt": "needs a GPU",
}
"""Requirements that are not in the oldest environment, and why."""


def floors() -> dict[str, str]:
    """The lower bound of every package that a user installs, by its name; the same in all extras."""
    lines = PROJECT["project"]["dependencies"] + [n for e, needs in EXTRAS.items() if e != "dev" for n in needs]
    out: dict[str, str] = {}
    for need in map(Requirement, lines):
        if need.name == "edgeprune":
            continue
        (floor,) = (bound.version for bound in need.specifier if bound.operator == ">=")
        assert out.setdefault(need.name, floor) == floor, need.name
    return out


def test_every_floor_is_the_version_that_check_matrix_runs() -> None:
    lines = (ROOT / "tests" / "matrix" / "oldest.txt").read_text("utf-8").splitlines()
    pinned = {n: Version(v) for n, _, v in (line.partition("==") for line in lines if not line.startswith("#"))}
    assert {n: Version(v) for n, v in floors().items() if n not in NOT_RUN} == {
        name: pinned.get(name) for name in floors() if name not in NOT_RUN
    }
    assert not NOT_RUN.keys() & pinned.keys() and NOT_RUN.keys() <= floors().keys()
    # An extra that is not installed there would be tested at no version at all.
    (extras_run,) = re.findall(r"^OLDEST_EXTRAS := (\S+)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    run = {requirement(line) for extra in extras_run.split(",") for line in EXTRAS[extra]}
    run |= {requirement(line) for line in PROJECT["project"]["dependencies"]}
    assert floors().keys() - run == NOT_RUN.keys()


def test_the_docs_list_the_floors() -> None:
    table = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \|", (ROOT / "docs" / "install.md").read_text("utf-8"), re.M)
    assert dict(table) == floors() and len(table) == len(floors())


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
            path.suffix in {".py", ".j2", ".toml", ".yaml"}
            or "assets" in path.parts
            or path.name in ("py.typed", "architectures.json", "encoders.json", "pipelines.json")
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


TORCH = {"torch", "diffusers", "transformers", "accelerate", "nncf"}


def closure(extra: str = "") -> dict[str, Distribution]:
    """By name, all that `pip install edgeprune[extra]` brings, with all that needs in turn."""
    found: dict[str, Distribution] = {}
    waiting = [Requirement(line) for line in PROJECT["project"]["dependencies"] + EXTRAS.get(extra, [])]
    while waiting:
        need = waiting.pop()
        if need.name in found or (need.marker and not need.marker.evaluate({"extra": ""})):
            continue
        found[need.name] = distribution(need.name)
        for line in found[need.name].requires or []:
            inner = Requirement(line)
            if not inner.marker or any(inner.marker.evaluate({"extra": e}) for e in ("", *need.extras)):
                waiting.append(inner)
    return found


def link_install(into: Path, extra: str = "") -> None:
    """Link the files of `closure(extra)` and nothing else into a folder."""
    into.mkdir()
    for found in closure(extra).values():
        for top in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (into / top).exists():
                (into / top).symlink_to(found.locate_file(top))


@pytest.mark.parametrize("extra", ["", "onnx", "openvino", "coreml", "trt-rtx"])
def test_a_device_gets_no_torch(extra: str) -> None:
    """From the installed packages' metadata; `trt` has the same beside TensorRT itself, which is no Python code."""
    names = {name.lower() for name in closure(extra)}
    assert {requirement(line) for line in EXTRAS.get(extra, [])} <= names and not names & TORCH
    assert {requirement(line) for line in EXTRAS["trt"]} - {"tensorrt"} <= {name.lower() for name in closure("trt-rtx")}


def test_the_extra_that_is_named_brings_what_is_missing() -> None:
    """What runtimes, exports and `compress` say to install is what installs the package."""
    called = {"cuda.bindings.runtime": "cuda-bindings", "PIL": "pillow", "tensorrt|tensorrt_rtx": "tensorrt"}
    called["openvino_tokenizers"] = "openvino-tokenizers"
    told = [(info.extra, info.packages) for info in runtimes.RUNTIMES.values()]
    told += [*export.NEEDS.values(), ("compress", extras.COMPRESS)]
    told.append(("deepspeed", ("deepspeed",)))
    told += [(name, known.packages) for name, known in metrics.KNOWN.items() if known.packages]
    for names, packages in told:
        brought = {requirement(line) for extra in names.split(",") for line in EXTRAS[extra]}
        brought |= {requirement(line) for line in PROJECT["project"]["dependencies"]}
        assert {called.get(package, package) for package in packages} <= brought, names


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel, installed."""
    out = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(out)]
    installed = subprocess.run([*command, str(wheel)], capture_output=True, text=True)
    assert installed.returncode == 0, installed.stderr
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the base install brings."""
    out = tmp_path_factory.mktemp("base") / "base"
    link_install(out)
    return out


def run_with(folders: list[Path], code: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Python with these folders and its own library only.

    -I -S: no site-packages, no editable finder, no current folder; so neither torch nor this tree can be found.
    """
    path = f"import sys; sys.path[:0] = {[str(folder) for folder in folders]!r}\n"
    command = [sys.executable, "-I", "-S", "-c", path + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


PROBE = """
import importlib.util, sys
import edgeprune, edgeprune.common.errors, edgeprune.runtimes, edgeprune.targets
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
"""
CLI = "import sys\nfrom edgeprune.cli import main\nsys.argv[0] = 'edgeprune'\nmain()"


def test_wheel_in_an_environment_without_torch(site: Path, base: Path, tmp_path: Path) -> None:
    code = PROBE.format(version=version("edgeprune"), site=str(site)) + CLI
    run = run_with([site, base], code, "--help", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "compress" in run.stdout


def as_ir(exported: Path, out: Path) -> Path:
    """An ONNX export as OpenVINO's, without tracing it again."""
    from edgeprune.export.to_openvino import converted

    shutil.copytree(exported, out)
    for path in out.glob("*/model.onnx"):
        converted(path)
    record = json.loads((out / "edgeprune_export.json").read_text("utf-8"))
    (out / "edgeprune_export.json").write_text(json.dumps(record | {"target": "openvino"}))
    return out


@pytest.mark.parametrize(("extra", "runtime"), [("onnx", "ort"), ("openvino", "openvino")])
def test_an_image_without_torch(
    extra: str, runtime: str, site: Path, tiny_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """`pip install edgeprune[extra]` and an export are all that a device needs."""
    folder = tiny_folders[1] if extra == "onnx" else as_ir(tiny_folders[1], tmp_path / "ir")
    link_install(tmp_path / extra, extra)
    arguments = ["generate", "two red circles", "--model", folder, "-o", "out.png", "--runtime", runtime]
    code = PROBE.format(version=version("edgeprune"), site=str(site)) + CLI
    run = run_with([site, tmp_path / extra], code, *arguments, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (64, 64)


MISSING = {
    "runtime ort": "onnxruntime is not installed; run: pip install 'edgeprune[onnx]'",
    "runtime openvino": "openvino is not installed; run: pip install 'edgeprune[openvino]'",
    "runtime trt": "cuda-bindings is not installed; run: pip install 'edgeprune[trt]'",
    "runtime coreml": "coremltools is not installed; run: pip install 'edgeprune[coreml]'",
    "runtime eager": "torch is not installed; run: pip install 'edgeprune[compress]'",
    **{f"export {fmt}": f"run: pip install 'edgeprune[compress,{needs[0]}]'" for fmt, needs in export.NEEDS.items()},
    "compress": "is not installed; run: pip install 'edgeprune[compress]'",
}


@pytest.mark.parametrize("what", MISSING)
def test_a_missing_extra_is_one_line(
    what: str, site: Path, base: Path, tiny_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """In a base install: every runtime, every export format, and compressing."""
    assert {f"runtime {name}" for name in runtimes.RUNTIMES} | {f"export {name}" for name in export.FORMATS} <= {
        *MISSING
    }
    kind, _, name = what.partition(" ")
    folder = tmp_path / "folder"
    if kind == "runtime":
        folder.mkdir()
        for file in ("model_index.json", "edgeprune_export.json")[: 1 if name == "eager" else 2]:
            (folder / file).write_text(json.dumps({"target": "".join(runtimes.RUNTIMES[name].formats[:1])}))
        arguments = ["generate", "x", "--model", folder, "--runtime", name]
    elif kind == "export":
        arguments = ["export", tiny_folders[0], "--target", name, "-o", "out"]
    else:
        arguments = ["compress", "-o", "out"]
    run = run_with([site, base], CLI, *arguments, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: ") and run.stderr.endswith(f"{MISSING[what]}\n")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["ort", "openvino", "eager"])
def test_importing_a_runtime_without_its_extra(name: str, site: Path, base: Path, tmp_path: Path) -> None:
    """The others import only what is there: `coreml` looks for its package on a Mac, `trt` when it opens a folder."""
    code = f"""
from edgeprune.common.errors import MissingExtraError
try:
    import edgeprune.runtimes.{name}
except MissingExtraError as error:
    print(error)
"""
    run = run_with([site, base], code, cwd=tmp_path)
    assert run.stdout.strip() == MISSING[f"runtime {name}"], run.stderr


def test_doctor_in_a_base_install(site: Path, base: Path, tmp_path: Path) -> None:
    run = run_with([site, base], CLI, "doctor", "--json", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)["findings"]
    hardware = {f["what"] for f in found if f["why"] in ("needs macOS", "needs an NVIDIA GPU")}
    assert hardware <= {"run coreml", "run trt"} and not any(f["works"] for f in found)
    # The command is whole on the screen, where 80 columns are: not taken for markup, not broken over lines.
    assert all(f"pip install 'edgeprune[{f['fix'][23:-2]}]' (missing" in run.stderr for f in found if f["fix"])
    assert {f["what"] for f in found if not f["fix"]} == hardware


def test_a_study_in_a_base_install(site: Path, base: Path, tmp_path: Path) -> None:
    """It is made and served without the extra; only its results need one, and say so."""
    folders = [f"{name}={path}" for name, path in image_folders(tmp_path / "images").items()]
    prompts = ["--prompts", tmp_path / "images" / "prompts.txt"]
    run = run_with([site, base], CLI, "study", "new", "taste", "--variants", *folders, *prompts, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    serving = "from pathlib import Path\nfrom edgeprune.user_study.server import ASSETS, StudyServer\n"
    serving += "with StudyServer(Path('taste')) as server: print(server.address, (ASSETS / 'page.html').is_file())"
    run = run_with([site, base], serving, cwd=tmp_path)
    assert run.stdout.startswith("http://127.0.0.1:") and run.stdout.endswith("/ True\n"), run.stderr
    run = run_with([site, base], CLI, "study", "results", "taste", cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "error: scipy is not installed; run: pip install 'edgeprune[study]'\n"
