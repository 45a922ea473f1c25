"""Which caption belongs to which image, from the names of files alone: in a folder or in an archive, in any order.

1.jpg, 1.txt                        the same name
s1.input.jpg, s1.outputs.txt        the same name up to a dot, as webdataset groups them
images/1.jpg, captions/1.txt        the same name in two folders, where it is the only one of each kind
1.jpg, 1.seg.png, 1.txt             one image has the caption's very name: the other belongs to it, and is no entry
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
"""In order of preference, where two images have one name."""


@dataclass
class Group:
    """An image and the files that may hold its caption."""

    name: str
    """The image's name without its suffix, or that of the texts."""
    image: str | None = None
    texts: dict[str, str] = field(default_factory=dict)
    """Names of files by suffix, in lower case."""


def is_hidden(name: str) -> bool:
    """Return whether a file is one that systems add: `._1.jpg` and `__MACOSX/` of macOS, `.cache/`."""
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in name.split("/"))


def grouped(names: Iterable[str], texts: tuple[str, ...]) -> list[Group]:
    """Return the entries among files, in the order of the first file of each.

    Args:
        names: paths with slashes.
        texts: the suffixes of files that may hold captions, in lower case.
    """
    images, captions, place = dict[str, str](), dict[str, Group](), dict[str, int]()
    for number, name in enumerate(names):
        suffix = PurePosixPath(name).suffix
        stem, kind = name[: len(name) - len(suffix)], suffix.lower()
        if is_hidden(name) or kind not in (*IMAGES, *texts):
            continue
        place.setdefault(stem, number)
        if kind in texts:
            captions.setdefault(stem, Group(stem)).texts[kind] = name
        elif stem not in images or IMAGES.index(kind) < IMAGES.index(PurePosixPath(images[stem]).suffix.lower()):
            images[stem] = name
    pairs = _matched(images, captions)
    taken, common = {caption for caption, _ in pairs.values()}, {name for _, name in pairs.values()}
    out = [(stem, Group(stem, images[stem], captions[caption].texts)) for stem, (caption, _) in pairs.items()]
    # What shares its name up to a dot with a pair is a further file of that pair.
    rest = [Group(stem, image) for stem, image in images.items() if stem not in pairs]
    rest += [group for stem, group in captions.items() if stem not in taken]
    out += [(group.name, group) for group in rest if common.isdisjoint(_prefixes(group.name))]
    return [group for _, group in sorted(out, key=lambda item: place[item[0]])]


def _matched(images: dict[str, str], captions: dict[str, Group]) -> dict[str, tuple[str, str]]:
    """Return, by the stem of the image, the stem of its captions and the name that both have."""
    pairs = {stem: (stem, stem) for stem in images if stem in captions}
    free: dict[str, str] = {}
    for stem in captions:
        for prefix in _prefixes(stem) if stem not in pairs else ():
            free.setdefault(prefix, stem)
    # A name under which there is a pair already groups nothing: img.v2.0001 and img.v2.0002 merely have dots.
    used = {prefix for stem in pairs for prefix in _prefixes(stem)}
    for stem in images:
        for prefix in _prefixes(stem):
            if prefix in used:
                break
            if prefix in free:
                pairs[stem] = free[prefix], prefix
                used.update(_prefixes(stem), _prefixes(free[prefix]))
                break
    return pairs | _across_folders([s for s in images if s not in pairs], captions, {s for s, _ in pairs.values()})


def _across_folders(images: list[str], captions: dict[str, Group], taken: set[str]) -> dict[str, tuple[str, str]]:
    """Match what is left where a name is the only one of its kind."""
    names: tuple[dict[str, list[str]], dict[str, list[str]]] = ({}, {})
    for found, stems in zip(names, (images, [stem for stem in captions if stem not in taken]), strict=True):
        for stem in stems:
            found.setdefault(PurePosixPath(stem).name, []).append(stem)
    first, second = names
    return {
        stems[0]: (second[name][0], stems[0])
        for name, stems in first.items()
        if len(stems) == 1 and len(second.get(name, ())) == 1
    }


def _prefixes(stem: str) -> list[str]:
    """Return a name cut at each of its dots, the longest first: a/1.b.c, a/1.b, a/1."""
    folder, slash, name = stem.rpartition("/")
    parts = name.split(".")
    return [folder + slash + ".".join(parts[:count]) for count in range(len(parts), 0, -1)]
