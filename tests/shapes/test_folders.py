"""A folder says which world it draws, in one file that is read strictly."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune.common.errors import InputError
from edgeprune.shapes import PLAIN, RICH, save_world, world_of


def test_a_folder_draws_the_world_that_it_names(tmp_path: Path) -> None:
    assert world_of(tmp_path) is None
    for world in (PLAIN, RICH):
        save_world(world, tmp_path)
        assert world_of(tmp_path) is world


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"world": "poor"}', 'found .*poor.*, expected {"world": "plain"} or {"world": "rich"}'),
        ('{"world": ["rich"]}', "found .*, expected"),
        ('{"world": "rich", "split": "training"}', "found .*split.*, expected"),
        ("{}", "found {}, expected"),
        ("rich", "not readable as JSON"),
    ],
)
def test_what_the_file_may_not_contain(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "world.json").write_text(text)
    with pytest.raises(InputError, match=rf"world\.json: {said}") as caught:
        world_of(tmp_path)
    assert "\n" not in str(caught.value)
