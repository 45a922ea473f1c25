"""What the commands show: warnings as lines, quiet vendors, and dry runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from edgeprune.cli import app, screen, usage


def script(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own."""
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def test_a_warning_is_one_line() -> None:
    done = script("""if True:
        import warnings
        from edgeprune import cli

        @cli.app.command()
        def warn():
            warnings.warn("the first line\\n  and the \\x1b[31msecond", UserWarning)
            warnings.warn("only for developers", DeprecationWarning, stacklevel=9)

        import sys
        sys.argv = ["edgeprune", "warn"]
        cli.main()
    """)
    assert done.returncode == 0
    assert done.stderr == "warning: the first line and the \\x1b[31msecond\n"


@pytest.mark.slow  # tokenizers of the published sizes
@pytest.mark.parametrize("kind", ["sd3.5-large", "flux.1-schnell"])
def test_synth_shows_nothing_of_its_vendors(kind: str, tmp_path: Path) -> None:
    code = """if True:
        import sys
        from edgeprune.families import published
        small = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32, "joint_attention_dim": 64}
        small |= {"pooled_projection_dim": 64}
        known = {
            "sd3.5-large": small | {"caption_projection_dim": 64},
            "flux.1-schnell": small | {"num_single_layers": 1, "axes_dims_rope": [8, 12, 12]},
        }
        real = published.transformers()
        published.transformers = lambda: {name: real[name] | changes for name, changes in known.items()}
        from edgeprune.cli import main
        sys.argv[0] = "edgeprune"
        main()
    """
    done = script(code, "synth", kind, "--tiny-encoders", "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == [kind, str(tmp_path / "out"), "next"], done.stderr
    assert done.stdout == ""


def test_a_forecast_shows_units_and_prints_plain_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = {"int4_bytes": 3_576_100_000, "steps": 1000}
    screen.show_forecast(numbers, "a remark", as_json=True)
    printed = capsys.readouterr()
    assert json.loads(printed.out) == numbers
    assert "3.58 GB" in printed.err and "1,000" in printed.err and "a remark" in printed.err
    screen.show_forecast(numbers, "a remark", as_json=False)
    assert capsys.readouterr().out == ""


def test_a_command_that_took_a_while_says_how_long_and_how_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = CliRunner().invoke(app, ["targets", "list"])
    assert "took" not in quick.output
    monkeypatch.setattr(usage, "WORTH_SAYING_S", -1.0)
    taken = re.search(r"took \d+ s; peak memory (\d+\.\d\d) GB$", CliRunner().invoke(app, ["doctor"]).output.strip())
    assert taken and float(taken[1]) > 0.01


def test_on_a_gpu_its_peak_stands_beside_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    def gpu(*peaks: int) -> SimpleNamespace:
        return SimpleNamespace(
            is_initialized=lambda: bool(peaks), device_count=lambda: len(peaks), max_memory_reserved=lambda i: peaks[i]
        )

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=gpu(0, 5 * 10**9), xpu=gpu()))
    assert re.fullmatch(r"took 20 min; peak memory \d+\.\d\d GB, of cuda:1 5\.00 GB", usage.taken(1200.0))
