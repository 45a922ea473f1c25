"""Whether a folder's tokenizer means the chat in which its family gives Qwen3 a prompt. Torch-free.

The chat is two constants (families/encoders.py), in torch and in exports alike. A folder's chat template is a program:
it is never run for a prompt, only once, within limits of time and memory, to see that the folder means these constants.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.common.files import read_json
from edgeprune.families.encoders import Chat

MOST_BYTES = 65_536
"""Of a template; that of Qwen3 has 4,168."""
_SECONDS = 30
"""That rendering may take, the start of a process included. Of its own work it may take 5."""
_PROBE = "\u2603 the prompt \u2603"
_REMEDY = "give the tokenizer of the published model"


def check_chat(folder: Path, chat: Chat) -> None:
    """Check that a tokenizer writes a prompt as its chat has it, and pads and cuts at the end.

    Args:
        folder: the tokenizer's.
        chat: the family's.

    Raises:
        InputError: a file is missing or damaged, the chat template is missing, too long, broken or another one, or a
            side is not the right one.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    rules = read_json(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else {}
    for side, field in (("padding_side", "padding"), ("truncation_side", "truncation")):
        rule = rules.get(field)
        direction = rule.get("direction", "Right") if isinstance(rule, dict) else "Right"
        # A rule of the file holds where the config says nothing.
        if (found := config.get(side, str(direction).lower())) != "right":
            raise InputError(f"{path}: {side}: found {shown(found)}, expected 'right'; {_REMEDY}")
    if chat.thinking is None:
        return
    where, template = _template(folder, config)
    if len(template.encode("utf-8", "surrogatepass")) > MOST_BYTES:
        raise InputError(f"{where}: found a chat template above {MOST_BYTES:,} bytes, expected Qwen3's; {_REMEDY}")
    if fault := _fault(template, chat):
        raise InputError(f"{where}: chat template {fault}, expected Qwen3's; {_REMEDY}")


def _template(folder: Path, config: dict[str, Any]) -> tuple[str, str]:
    """Return where a tokenizer's chat template is, and its text; a file of its own counts first, as in transformers."""
    path, own = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    if own.is_file():
        try:
            with own.open("rb") as file:
                return str(own), file.read(MOST_BYTES + 1).decode()
        except (OSError, ValueError) as error:
            raise InputError(f"{own}: cannot be read as text ({error}), expected a chat template; {_REMEDY}") from None
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = [each for each in found if isinstance(each, dict) and each.get("name") == "default"]
        found = named[0].get("template") if named else None
    if not isinstance(found, str):
        raise InputError(f"{path}: chat_template: found {shown(found)}, expected Qwen3's; {_REMEDY}")
    return f"{path}: chat_template", found


@functools.cache
def _fault(template: str, chat: Chat) -> str:
    """Return what is wrong with a template; '' if it writes the chat.

    It renders in a process of its own, see chat_probe.py, which returns no more than is compared.
    """
    expected = chat.around(_PROBE).encode()
    script = Path(__file__).with_name("chat_probe.py")
    call = [sys.executable, "-I", str(script), _PROBE, str(len(expected) + 1), "thinking"]
    call = call if chat.thinking else call[:-1]
    try:
        done = subprocess.run(
            call, input=template.encode("utf-8", "surrogatepass"), capture_output=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return "takes too long"
    if done.returncode:
        said = done.stderr[-500:].decode(errors="replace").split("\n")
        return f"cannot be used ({shown(next((line for line in reversed(said) if line.strip()), 'no reason given'))})"
    return "" if done.stdout == expected else f"makes {shown(done.stdout.decode(errors='replace'))} of a prompt"
