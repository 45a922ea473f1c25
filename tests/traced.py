"""Reuse of traced networks. Tracing takes seconds, and most tiny pipelines have the same text encoders and VAE."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from edgeprune.export import to_onnx


def reuse(patch: pytest.MonkeyPatch, traced: Path, *names: str) -> None:
    """Export these networks from the ONNX files in `traced` instead of tracing them.

    An export compares each file with its own checkpoint, so other weights would fail.
    """
    real = to_onnx.NetworkSource.to_ir

    def to_ir(self: to_onnx.NetworkSource, *, half: bool = False) -> ir.Model:
        if self.name in names and not half:
            return ir.load(traced / self.name / "model.onnx")
        return real(self, half=half)

    patch.setattr(to_onnx.NetworkSource, "to_ir", to_ir)


def only(patch: pytest.MonkeyPatch, name: str) -> None:
    """Export one network of a pipeline alone."""
    real = to_onnx.sources
    patch.setattr(
        to_onnx, "sources", lambda artefact, has=None, **how: real(artefact, lambda other: other != name, **how)
    )
