"""The artefact folder being made, one stage after the other: analyze, plan, prune, distill, quantize."""
