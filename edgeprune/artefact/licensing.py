"""The license of a model: its files, and what its card says of it. Both go into everything made from the model.

Stability's licenses and FLUX.1 dev's, for example, ask for a copy of the license, for its notices and for a statement
of changes with every derivative. Whether the license permits a use is for the user to read. Torch-free.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgeprune.artefact.manifest import MANIFEST
from edgeprune.common import linking
from edgeprune.common.errors import InputError
from edgeprune.common.files import cannot_write, inside, read_json
from edgeprune.common.hub_cache import is_hub_id
from edgeprune.residency.model_files import UNSAFE

CARD = "README.md"
KEYS = ("license", "license_name", "license_link", "base_model")
"""Fields of a model card's front matter, with the hub's names."""
NESTED = "licenses"
"""The folder for the license files of a pipeline's parts: licenses/text_encoder/LICENSE."""
Fields = dict[str, str | list[str]]

_NAME = re.compile(
    r"licen[cs]e|copying|copyright|notice|attribution|polic(y|ies)|acceptable.?use|terms|(^|[^a-z])aup([^a-z]|$)", re.I
)
_NEVER = (*UNSAFE, "*.json", "*.safetensors", "*.gguf", "*.onnx*", "*.msgpack")
_LARGEST = 2**22
"""In bytes; a larger file is no license. The limit of the card, too."""
_LONGEST = 300
_PLAIN, _PART = re.compile(r"[\w .,()+-]{1,120}", re.ASCII), re.compile(r"[\w-]{1,60}", re.ASCII)
"""Names of files and of parts; nobody's license has another, and they are shown in cards."""


def files(folder: Path) -> dict[str, Path]:
    """Return the license files of a pipeline folder, by the name that a copy gets.

    Files of the folder keep their names. Files of its parts are collected in NESTED, since an export replaces the
    parts. A file that the card links to counts, whatever its name.

    Raises:
        InputError: a file is a symlink that leads out of the folder.
    """
    found = {path.name: path for path in sorted(folder.glob("*")) if _is_license(path)}
    link = _card(folder).get("license_link")
    if isinstance(link, str) and "/" not in link and link != CARD and _is_text(folder / link):
        found[link] = folder / link
    for root in (folder / NESTED, folder):
        for path in sorted(root.glob("*/*")):
            part = path.parent.name
            if _is_license(path) and _PART.fullmatch(part) and part not in (NESTED, "cache"):
                found[f"{NESTED}/{part}/{path.name}"] = path
    return {name: inside(folder, str(path.relative_to(folder)), "link") for name, path in found.items()}


def among(folder: Path, paths: Iterable[str]) -> list[str]:
    """Return the card and the license files among the paths of a repository.

    Args:
        folder: holds the card, if there is one.
    """
    link = _card(folder).get("license_link")
    top = {path for path in paths if "/" not in path and (_is_name(path) or path in (CARD, link) and _is_plain(path))}
    below = [path.split("/") for path in paths if path.count("/") == 1]
    return sorted(top | {f"{part}/{name}" for part, name in below if _PART.fullmatch(part) and _is_name(name)})


def _is_license(path: Path) -> bool:
    return _is_name(path.name) and _is_text(path)


def _is_name(name: str) -> bool:
    return _NAME.search(name) is not None and _is_plain(name)


def _is_plain(name: str) -> bool:
    return not any(fnmatch.fnmatch(name.lower(), pattern) for pattern in _NEVER) and _PLAIN.fullmatch(name) is not None


def _is_text(path: Path) -> bool:
    return _is_plain(path.name) and path.is_file() and path.stat().st_size <= _LARGEST


def copy(source: Path, folder: Path) -> None:
    """Copy the license files of a pipeline.

    Raises:
        InputError: a file is a symlink that leads out of the source.
        DiskError: the disk is full, or `folder` cannot be written.
    """
    for name, path in files(source).items():
        try:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            linking.copy(path, folder / name)
        except OSError as error:
            raise cannot_write(folder / name, error) from error


def read(folder: Path, named: str = "") -> Fields:
    """Return what a card of something made from this model has to say: the fields of KEYS that are known.

    An artefact's manifest says it; elsewhere the card (README.md) of the model does. A model with a license file but
    no card has the license `other` with a link to that file.

    Args:
        folder: an artefact or an original model's folder.
        named: the model as the user named it. A hub id is the base model.

    Raises:
        InputError: an artefact's manifest is damaged.
    """
    if (folder / MANIFEST).is_file():
        return usable(read_json(folder / MANIFEST).get("license"))
    fields, names = _card(folder), list(files(folder))
    texts = [name for name in names if re.search(r"licen[cs]e|copying", name, re.I)] or names
    if "license" not in fields and texts:
        fields["license"] = "other"
    link = fields.get("license_link")
    if isinstance(link, str) and not link.startswith(("https://", "http://")) and link not in names:
        del fields["license_link"]  # it led to a file of the source that is not here
    if fields.get("license") == "other" and texts:
        fields.setdefault("license_link", texts[0])
    if is_hub_id(named) and not Path(named).exists():
        fields["base_model"] = named
    return {key: fields[key] for key in KEYS if key in fields}


def _card(folder: Path) -> Fields:
    """Return the usable fields of a card's front matter; none if there is no card or it is damaged."""
    path = folder / CARD
    if not _is_text(path):
        return {}
    from huggingface_hub import metadata_load  # yaml.safe_load

    try:
        return usable(metadata_load(inside(folder, CARD, "link")))
    except InputError:
        raise
    except Exception:  # what YAML's parser raises has no common base
        return {}


def usable(fields: Any) -> Fields:
    """Return the fields of KEYS that hold a text or a list of texts; someone else wrote them."""
    if not isinstance(fields, Mapping):
        return {}
    out: Fields = {}
    for key in KEYS:
        value = fields.get(key)
        if isinstance(value, str) and (text := _one_line(value)):
            out[key] = text
        elif isinstance(value, list) and value and all(isinstance(item, str) for item in value[:20]):
            out[key] = [_one_line(item) for item in value[:20]]
    return out


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:_LONGEST]
