"""A process that renders a chat template once, for `check_chat`: `chat_probe.py PROMPT MOST_BYTES [thinking]`.

The template is on stdin. It imports nothing of edgeprune. Where the system can limit a process, it has 5 seconds and
1 GB.
"""

from __future__ import annotations

import contextlib
import sys

_SECONDS, _BYTES = 5, 10**9


def main() -> None:
    """Write the first bytes of what the template makes of a chat of one message; errors end the process with 1."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    prompt, most, thinking = sys.argv[1], int(sys.argv[2]), sys.argv[3:] == ["thinking"]
    # As in transformers.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    template = environment.from_string(sys.stdin.buffer.read().decode())
    chat = [{"role": "user", "content": prompt}]
    written = b""
    for piece in template.generate(
        messages=chat, tools=None, documents=None, add_generation_prompt=True, enable_thinking=thinking
    ):
        written += piece[:most].encode()
        if len(written) >= most:
            break
    sys.stdout.buffer.write(written[:most])


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # a template's, of any kind
        sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}"[:200])
        sys.exit(1)
