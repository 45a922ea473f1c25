"""References: text-to-image folders of diffusers that no family of edgeprune knows, such as SANA-Sprint or Chroma.

A reference is something to compare with. Its own pipeline draws it, in torch; edgeprune never compresses, trains or
exports it. folder.py says what is one, pipeline.py loads it, staged.py keeps one part in memory at a time, and
drawing.py draws. Pipelines that take more than a prompt are not supported.
"""

from edgeprune.reference.folder import PIPELINE, is_reference

__all__ = ["PIPELINE", "is_reference"]
