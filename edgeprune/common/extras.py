"""Optional packages: whether they are installed and new enough, and a one-line error that names the extra if not.

Nothing is imported to find out. Versions are compared by `edgeprune doctor` alone; elsewhere pip has seen to them.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

from edgeprune.common.errors import MissingExtraError

COMPRESS = (
    *("accelerate", "diffusers", "jinja2", "matplotlib", "nncf", "onnx", "onnxscript", "scipy", "torch"),
    "transformers",
)
"""Packages that compression imports; an export needs them too."""
TORCH = "eager"
"""The runtime that computes in torch, and that `--device` is about."""
_DISTRIBUTIONS = {
    "PIL": "pillow", "cuda.bindings.runtime": "cuda-bindings", "openvino_tokenizers": "openvino-tokenizers",
}  # fmt: skip
"""Import names that differ from the PyPI name."""


def absent(package: str) -> bool:
    """Return whether a package is not installed, without importing it."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # its parent package is absent
        return True
    # A folder without code, such as an export named `openvino` in the working directory, has a spec but no origin.
    return spec is None or spec.origin is None


def distribution(package: str) -> str:
    """Return a package's name on PyPI."""
    return _DISTRIBUTIONS.get(package, package)


def missing(packages: tuple[str, ...]) -> list[str]:
    """Return the packages that are not installed; `a|b` means either one will do."""
    return [package for package in packages if all(map(absent, package.split("|")))]


def require(packages: tuple[str, ...], extra: str) -> None:
    """Stop unless these packages are installed.

    Args:
        extra: the extra that installs them, or several separated by commas.

    Raises:
        MissingExtraError: a package is not installed.
    """
    if lacking := missing(packages):
        raise MissingExtraError(distribution(lacking[0]), extra)


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Guard imports: an absent package raises MissingExtraError; a broken one raises its own error.

    Raises:
        MissingExtraError: an imported package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or not absent(error.name.partition(".")[0]):
            raise
        raise MissingExtraError(distribution(error.name.partition(".")[0]), extra) from None


def outdated(extra: str) -> list[str]:
    """Return `torch>=2.7` for each installed package that is older than the base install or an extra needs.

    Args:
        extra: one extra, or several separated by commas; `onnx` includes its variant `onnx-gpu`.
    """
    out = []
    for line in metadata.requires("edgeprune") or []:
        need, _, marker = line.partition(";")
        name, floor = re.match(r"[\w.-]+", need), re.search(r">=\s*([\d.]+)", need)
        of = re.search(r"extra == ['\"]([\w-]+)", marker)
        asked = of is None or any(of[1] == e or of[1].startswith(f"{e}-") for e in extra.split(","))
        if not (name and floor and asked) or _uninstalled(name[0]):
            continue
        if _release(metadata.version(name[0])) < _release(floor[1]):
            out.append(f"{name[0]}>={floor[1]}")
    return out


def _release(version: str) -> list[int]:
    """Return 2.7.0+cpu as [2, 7]: trailing zeros do not count."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return [int(part) for part in re.sub(r"(\.0+)+$", "", numbers[0]).split(".")] if numbers else []


def conflicts() -> list[str]:
    """Return one line for each pair of installed packages that break each other, with the command that fixes it."""
    both = ("onnxruntime", "onnxruntime-gpu")
    if any(_uninstalled(name) for name in both):
        return []
    return [
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; keep one: "
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'edgeprune[onnx-gpu]'"
    ]


def _uninstalled(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return True
    return False
