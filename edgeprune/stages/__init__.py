"""The stages that make an artefact, one file each: analyze, plan, prune, distill, quantize.

`compress` runs all of them. `workspace` holds the folder that they work on, `options` their options.
"""
