# TEMP facade
"""Old names of chunked_onnx.py."""

from edgeprune.export.chunked_onnx import CHUNK_BYTES as PIECE_BYTES
from edgeprune.export.chunked_onnx import ChunkedOnnx as Pieces

__all__ = ["PIECE_BYTES", "Pieces"]
