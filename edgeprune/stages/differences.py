"""Says in which inputs two runs of a stage differ."""

from __future__ import annotations

import json
from typing import Any

from edgeprune.common import fields

_SHORT, _MOST = 40, 3
"""Longest value, in characters, and most names that a message shows."""


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return in which inputs two runs of a stage differ, as part of a sentence.

    Args:
        before: of the earlier run, as the manifest keeps them.
        now: of this run.
    """
    earlier, later = _flat(before), _flat(json.loads(json.dumps(now)))
    changed = [name for name in earlier | later if earlier.get(name) != later.get(name)]
    if not changed:
        return "another model, or after other stages"
    texts = []
    for name in changed[:_MOST]:
        values = ["the default" if some.get(name) is None else fields.shown(some[name]) for some in (earlier, later)]
        short = max(map(len, values)) <= _SHORT
        another = f"{'other' if name.endswith('s') else 'another'} {name}"
        texts.append(f"{name}={values[0]}, not {values[1]}" if short else another)
    more = f" and {len(changed) - _MOST} more" if len(changed) > _MOST else ""
    return "; ".join(texts) + more


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, with names such as `options.steps`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
