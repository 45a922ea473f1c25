"""The command line: the app, its commands in panels, and the end of every run.

Each command is the module of its name, which imports heavy packages inside its function, so that `edgeprune --help` is
instant. Errors become one line on stderr and an exit code (common/errors.py), Python warnings one line each. Typer
itself refuses unknown options and choices.
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from edgeprune.cli import (
    analyze,
    bench,
    cache,
    compare,
    compress,
    convert,
    distill,
    doctor,
    export,
    generate,
    lora,
    plan,
    plot,
    prune,
    push,
    quantize,
    report,
    score,
    screen,
    study,
    synth,
    targets,
    tune,
    verify,
)
from edgeprune.cli.choices import Verb
from edgeprune.common import heap, invocation, processes, stop
from edgeprune.common.errors import EdgepruneError, InputError, MissingExtraError
from edgeprune.common.extras import COMPRESS, absent
from edgeprune.common.files import is_out_of_memory

SHARED = ("analyze", "distill")
"""Commands that can run in several processes."""
_CTRL_C = 130
"""The exit code that Typer makes of KeyboardInterrupt, without a word; old versions let it through."""
RESUMED = (
    *("analyze", "cache", "compare", "compress", "distill", "export", "lora", "plan", "prune", "quantize", "report"),
    *("synth", "tune"),
)
"""Commands that go on where they were stopped. So does `score` with -o; the others begin again."""
OUT_OF_MEMORY = (
    "out of memory; what is finished is kept. Try a smaller --batch, --gradient-checkpointing or "
    "--mixed-precision bf16 for training, or smaller images (--height, --width); close other programs, or use a larger "
    "machine. `--dry-run` of compress, analyze and distill shows the memory needed"
)

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make MMDiT diffusion models small enough for edge devices. Begin with: edgeprune compress -o small",
    epilog="Example: edgeprune compress -o small  ·  edgeprune export small --target onnx -o small-onnx",
)


PANELS = {
    "Compress": (compress, analyze, plan, prune, distill, quantize),
    "Export and run": (export, generate, tune, push),
    "Measure": (bench, verify, score, compare, report, plot),
    "Data": (cache,),
    "Tools": (convert, lora, synth, doctor),
}
"""The commands by panel of the help; each module has a function of its own name."""

for _panel, _modules in PANELS.items():
    for _module in _modules:
        _name = _module.__name__.rpartition(".")[2]
        app.command(_name, cls=Verb, epilog=_module.EPILOG, rich_help_panel=_panel)(getattr(_module, _name))
app.add_typer(study.app, name="study", rich_help_panel="Measure")
app.add_typer(targets.app, name="targets", rich_help_panel="Tools")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    heap.large_pages()
    typed = invocation.command.set(shlex.join(["edgeprune", *sys.argv[1:]]))
    context.call_on_close(lambda: invocation.command.reset(typed))
    if version:
        from edgeprune import __version__

        print(f"edgeprune {__version__}")
        raise typer.Exit
    if processes.count() > 1 and context.invoked_subcommand not in SHARED:
        raise InputError(f"only {' and '.join(SHARED)} can run in several processes; run other commands in one")


def main() -> None:
    """Run the app; turn errors and warnings into lines."""
    # The advice of transformers and diffusers is for developers; their errors still show.
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    warnings.showwarning = screen.show_warning
    try:
        app()
    except EdgepruneError as error:
        screen.fail(str(error), error.exit_code)
    except stop.Stopped:
        screen.fail(f"stopped by SIGTERM; {_again(sys.argv[1:])}", stop.EXIT_CODE)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != _CTRL_C:
            raise
        screen.fail(f"stopped; {_again(sys.argv[1:])}", _CTRL_C)
    except (MemoryError, OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            screen.fail(OUT_OF_MEMORY, 1)
        if not isinstance(error, OSError):
            raise
        hint = "; free some space and run again" if error.errno == errno.ENOSPC else ""
        screen.fail(f"{error.filename or 'file'}: {error.strerror or error}{hint}", 1)
    except ModuleNotFoundError as error:
        if error.name not in COMPRESS or not absent(error.name):
            raise
        screen.fail(str(MissingExtraError(error.name, "compress")), MissingExtraError.exit_code)


def _again(typed: Sequence[str]) -> str:
    """Return what to do after a stop."""
    kept = any(word.startswith(("-o", "--out")) for word in typed)
    resumes = typed and (typed[0] in RESUMED or (typed[0] == "score" and kept))
    return "run the same command again" + (" to resume" if resumes else "")
