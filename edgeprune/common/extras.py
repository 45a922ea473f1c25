"""What each extra brings, whether it is installed, and the one-line errors where it is not. Imports no vendor.

What it leaves out: which version is installed, and whether it works.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

from edgeprune.common.errors import MissingExtraError

COMPRESS = (
    *("accelerate", "diffusers", "jinja2", "matplotlib", "nncf", "onnx", "onnxscript", "scipy", "torch"),
    "transformers",
)
"""What compressing imports; an export needs these as well."""
_DISTRIBUTIONS = {"PIL": "pillow", "cuda.bindings.runtime": "cuda-bindings"}
"""What is not called as it is imported, as far as users are told of it."""


def absent(package: str) -> bool:
    """Whether a package is not installed; it is not imported."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # of the package that it is part of
        return True
    # A folder without code, such as an export named `openvino` in the working directory, has a spec but no origin.
    return spec is None or spec.origin is None


def distribution(package: str) -> str:
    """What pip calls it."""
    return _DISTRIBUTIONS.get(package, package)


def missing(packages: tuple[str, ...]) -> list[str]:
    """Those that are not installed; `a|b` is either."""
    return [package for package in packages if all(map(absent, package.split("|")))]


def require(packages: tuple[str, ...], extra: str) -> None:
    """Refuse to go on without these packages.

    Raises:
        MissingExtraError: one is not installed; `extra` (or several, with commas) brings it.
    """
    if lacking := missing(packages):
        raise MissingExtraError(distribution(lacking[0]), extra)


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around imports: a package that is not there becomes a MissingExtraError, one that is broken shows its own.

    Raises:
        MissingExtraError: an import inside found no such package.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or not absent(error.name.partition(".")[0]):
            raise
        raise MissingExtraError(error.name.partition(".")[0], extra) from None


def conflicts() -> list[str]:
    """Packages that spoil each other, one line each, with the command that mends it."""
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
