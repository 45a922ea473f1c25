"""Bad input on the command line: one clear line, exit code 2, no traceback, and nothing written."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgeprune.api.folders import check_out
from edgeprune.cli import app
from edgeprune.common.errors import InputError
from edgeprune.shapes import PLAIN

WIDE = {"COLUMNS": "400", "TERMINAL_WIDTH": "400"}
"""As in test_choices.py: Typer reads the width once, when it first shows something."""
DATA = Path(__file__).parents[1] / "samples"

REFUSED = [
    # Options that contradict each other.
    ("plan --config sd3.json --method hpp --blocks 3", "work with --method manual only, found --method hpp"),
    ("plan --config sd3.json --method koala --components 3:mlp", "manual only, found --method koala"),
    ("plan --config none.json --keep 0.7 --max-size 3GB", "give --keep or --max-size, not both"),
    ("compress -o x --dry-run --method hpp --blocks 3", "work with --method manual only, found --method hpp"),
    ("compress -o x --keep 0.7 --max-size 3GB", "give --keep or --max-size, not both"),
    ("compress -o x --dry-run --method hpp --threshold 0.3", "--threshold works with --method hybrid only, found"),
    ("compare -o x --preset demo --grid grid.toml", "give --preset or --grid, not both"),
    ("plan --config sd3.json --keep 0.79", "--method hpp needs contribution scores; give --scores FILE"),
    # A file where a folder is expected, a folder where a file is expected, and neither.
    ("compress -o afile --dry-run", "-o afile: afile is a file; use another -o"),
    ("compress -o afile/sub --steps 0", "-o afile/sub: afile is a file; use another -o"),
    ("analyze -o afile/sub", "-o afile/sub: afile is a file"),
    ("cache shapes -o afile", "-o afile: afile is a file"),
    ("compare -o afile", "-o afile: afile is a file"),
    ("export empty -o afile/sub", "-o afile/sub: afile is a file"),
    ("prune -o afile", "-o afile: afile is a file"),
    ("synth sd3.5-medium -o afile", "-o afile: afile is a file"),
    ("export afile -o x", "afile: found a file, expected a folder"),
    ("export empty -o x", "empty: no model_index.json; expected an artefact or a diffusers folder"),
    ("analyze afile -o x", "afile: found a file, expected a folder"),
    ("plan --config empty", "empty: found a folder, expected a file"),
    ("plan --config sd3.json --scores empty", "empty: found a folder, expected a file"),
    ("compare --grid empty -o x", "empty: found a folder, expected a file"),
    ("compare --grid none.toml -o x", "none.toml: no such file"),
    ("score none --metric clip", "none: no such folder"),
    ("verify none", "none: no such folder"),
    ("verify empty", "empty: no model_index.json"),
    ("verify --device tpu", "--device: found 'tpu', expected one of auto"),
    ("verify --height 60", "--height: found 60, expected a multiple of 8"),
    ("score empty --against none --metric clip", "none: no such folder"),
    ("score afile --metric clip", "afile: found a file, expected a folder"),
    ("lora afile --model empty -o x.safetensors", "--model empty: not an artefact folder; run `edgeprune compress`"),
    # Prompts and data, before anything is computed.
    ("compress -o x --data none", "--data none: no such file or folder; expected an imagefolder"),
    ("compress -o x --data none --dry-run", "--data none: no such file or folder; expected an imagefolder"),
    ("compress -o x --data empty --dry-run", "--data empty: not a known source; expected an imagefolder"),
    ("compress -o x --data afile --dry-run", "afile: no prompts; write one prompt per line"),
    ("compress -o x --prompts none.txt --dry-run", "none.txt: no such file"),
    ("compress -o x --prompts empty", "empty: found a folder, expected a text file with one prompt per line"),
    ("distill -o x --data none", "--data none: no such file or folder"),
    ("analyze -o x --prompts none.txt", "none.txt: no such file"),
    ("plan --config sd3.json --prompts none.txt", "none.txt: no such file"),
    ("cache empty -o x", "SOURCE empty: not a known source; expected an imagefolder"),
    ("cache none -o x --dry-run", "SOURCE none: no such file or folder"),
    # Numbers out of range.
    ("compress -o x --height 100 --dry-run", "--height: found 100, expected a multiple of 8"),
    ("compress -o x --width 100", "--width: found 100, expected a multiple of 8"),
    ("compress -o x --protect-first 99 --dry-run", "--protect-first: found 99, expected 0 to 14"),
    ("compress -o x --protect-first -1 --dry-run", "--protect-first: found '-1', expected a number of blocks, or one"),
    ("compress -o x --protect-first joint=3,joint=4", "found 'joint=3,joint=4', expected a number of blocks, or one"),
    ("compress -o x --protect-first single=3", "--protect-first: found a kind 'single', expected a kind of block of"),
    ("compress -o x --protect-first joint=15", "--protect-first joint: found 15, expected 0 to 14"),
    ("compress -o x --keep-components ff", "--keep-components: found 'ff', expected names from norm, context_norm"),
    ("compress -o x --keep-components attn --method hpp", "works with --method hybrid, milp only, found hpp"),
    ("plan --config sd3.json --keep-components attn --components 3:mlp", "--method hybrid, milp only, found manual"),
    ("compress -o x --protect-last 99", "--protect-last: found 99, expected 0 to 14"),
]  # fmt: skip

OUT_OF_RANGE = [
    ("compress -o x --steps -5 --dry-run", "--steps"),
    ("plan --config sd3.json --protect-last -1", "--protect-last"),
    ("analyze -o x --guidance-scale -1", "--guidance-scale"),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with an empty file, an empty folder, a config, and the path of a grid."""
    (tmp_path / "afile").touch()
    (tmp_path / "empty").mkdir()
    config = json.loads((DATA / "transformer_configs.json").read_text())["sd3.5-large"]
    (tmp_path / "sd3.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything(folder: Path) -> list[Path]:
    """Return all paths below a folder."""
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize(("command", "words"), REFUSED, ids=[command for command, _ in REFUSED])
def test_it_is_one_line_and_nothing_is_written(command: str, words: str, here: Path) -> None:
    before = everything(here)
    result = CliRunner().invoke(app, command.split(), env=WIDE)
    assert isinstance(result.exception, InputError), result.output  # `main` makes one line of it
    assert result.exception.exit_code == 2
    assert words in str(result.exception) and "Errno" not in str(result.exception)
    assert everything(here) == before


@pytest.mark.parametrize(("command", "option"), OUT_OF_RANGE, ids=[command for command, _ in OUT_OF_RANGE])
def test_a_number_out_of_range_is_refused_by_its_option(command: str, option: str, here: Path) -> None:
    before = everything(here)
    result = CliRunner().invoke(app, command.split(), env=WIDE)
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in re.sub(r"\s+", " ", result.output)
    assert everything(here) == before


def test_an_output_folder_may_be_new_or_exist(here: Path) -> None:
    for name in ("empty", "new", "new/below", "empty/below", "."):
        check_out(Path(name))


def test_an_output_folder_that_cannot_be_written_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "nowhere").symlink_to(here / "unmounted" / "disk")
    with pytest.raises(InputError, match="-o nowhere/x: nowhere is a link to nothing; make the folder"):
        check_out(Path("nowhere/x"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root
    with pytest.raises(InputError, match="-o empty: this folder is not writable here; use another -o"):
        check_out(Path("empty"))
    with pytest.raises(InputError, match="-o empty/a/b: the folder empty is not writable here"):
        check_out(Path("empty/a/b"))


@pytest.mark.parametrize("words", [["-h"], ["compress", "-h"], ["study", "new", "-h"], ["targets", "show", "-h"]])
def test_h_shows_the_help(words: list[str]) -> None:
    result = CliRunner().invoke(app, words, env=WIDE)
    assert result.exit_code == 0 and "Usage: " in result.output


def test_the_help_of_distill_gives_the_defaults() -> None:
    from edgeprune.stages.compress import preset

    help_text = CliRunner().invoke(app, ["distill", "-h"], env=WIDE).output
    usual, builtin = (preset("default", world=world, data="shapes") for world in (None, PLAIN))
    assert usual.distill is not None and builtin.distill is not None
    pairs = [(usual.data.samples, builtin.data.samples)]
    pairs += [(getattr(usual.distill, name), getattr(builtin.distill, name)) for name in ("steps", "schedule", "ema")]
    for one, other in pairs:
        assert f"[default: ({one}; {other} for teachers of shapes world)]" in help_text
    assert "[default: (1e-4; 5e-4 for teachers of shapes world)]" in help_text and "[default: (32)]" in help_text
    assert (usual.distill.rate, builtin.distill.rate) == (1e-4, 5e-4)
    assert usual.distill.batch == builtin.distill.batch == 32


def test_a_device_is_shown_in_units() -> None:
    result = CliRunner().invoke(app, ["targets", "show", "rtx"], env=WIDE)
    assert result.exit_code == 0
    assert re.search(r"memory +\S+ GB", result.output) and "bytes" not in result.output
    assert not re.search(r"\b(True|False)\b", result.output)
