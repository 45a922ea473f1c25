"""An artefact becomes a target's file: one translation of the quantised layer per target, gated by parity.

`to_onnx.export` writes the ONNX folder. This `__init__` imports nothing heavy and refuses any other import name:
with the project root on `sys.path` the folder would also be importable as `export`, and two copies of the
custom op's translation would exist.
"""

if __name__ != "edgeprune.export":
    raise ImportError(f"import this package as edgeprune.export, not as {__name__}")
