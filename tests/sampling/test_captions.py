"""edgeprune's own captions: the same list everywhere, natural, without duplicates, and split by content."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from pathlib import Path

import pytest

from edgeprune.common.errors import InputError
from edgeprune.common.splits import SEEDS, Split, split_of
from edgeprune.sampling.captions import SHARES, captions
from edgeprune.sampling.prompts import prompts

SHA256 = "205b09c7c31b285c998f0489338aad1a6dedb77232004b46da553d40ed8ef955"


def test_the_list_is_the_same_everywhere() -> None:
    text = "\n".join(caption.text for caption in captions())
    assert hashlib.sha256(text.encode()).hexdigest() == SHA256


def test_captions_differ_and_vary_in_length() -> None:
    texts = [caption.text for caption in captions()]
    assert 4000 <= len(texts) == len({text.lower() for text in texts}) <= 6000
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) <= 4 and 45 <= max(lengths) <= 60
    assert sum(length < 8 for length in lengths) > 250 < sum(length > 30 for length in lengths)


def test_captions_are_well_formed() -> None:
    for caption in captions():
        text = caption.text
        assert text == " ".join(text.split()) and text.isascii() and not set(text) & set("{}|/[]"), text
        # "a" before a vowel, "an" before a consonant, a word twice.
        assert not re.search(r"\ba [aeiou]|\ban (?!x-ray)[^aeiou]|\b(\w+) \1\b", text.lower()), text


def test_every_split_is_large_enough() -> None:
    counts = {split: len(prompts(split)) for split in Split}
    assert sum(counts.values()) == len(captions())
    assert counts[Split.TRAINING] > 0.65 * len(captions())
    assert all(count >= 300 for count in counts.values())
    assert sum(SHARES.values()) == pytest.approx(1)
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
    for split, count in counts.items():
        assert re.search(rf"\| {split.value} \|.*\| {count:,} \| {split.seed(0):,} \|", page), split


def test_no_content_is_in_two_splits() -> None:
    """Some contents are said in two ways; both are in one split."""
    texts = {split: set(prompts(split)) for split in Split}
    by_key = defaultdict(set)
    for caption in captions():
        by_key[caption.key].add(caption.text)
    assert sum(len(said) > 1 for said in by_key.values()) > 200
    for said in by_key.values():
        assert [said <= texts[split] for split in Split].count(True) == 1


def test_splits_share_neither_prompts_nor_seeds() -> None:
    texts = [set(prompts(split)) for split in Split]
    assert sum(map(len, texts)) == len(set().union(*texts))
    ends = sorted((split.seed(0), split.seed(SEEDS - 1)) for split in Split)
    assert all(last < first for (_, last), (first, _) in zip(ends, ends[1:], strict=False))
    assert Split.HELD_OUT.seeds(2, first=3) == [Split.HELD_OUT.seed(3), Split.HELD_OUT.seed(4)]


def test_a_split_ends() -> None:
    with pytest.raises(InputError, match=r"found 100000, expected at most \d+; give --prompts"):
        prompts(Split.TUNING, 100_000)
    for number in (-1, SEEDS):
        with pytest.raises(InputError, match="of held-out, expected at most 99,999,999"):
            Split.HELD_OUT.seed(number)


def test_the_first_captions_mix_all_kinds() -> None:
    """An analysis takes 28: they must not be of one kind."""
    for split in Split:
        first = prompts(split, 28)
        assert len({text.split()[-1] for text in first}) > 20
        assert any('"' in text for text in first) and any(len(text.split()) > 20 for text in first)


def test_split_of_follows_the_shares() -> None:
    shares = {Split.TRAINING: 0.75, Split.TUNING: 0.25}
    found = [split_of(f"content {i}", shares) for i in range(2000)]
    assert 0.72 < found.count(Split.TRAINING) / 2000 < 0.78
    assert set(found) == set(shares)
