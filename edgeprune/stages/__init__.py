"""The artefact folder being made, one stage after the other: analyze, plan, prune, distill, quantize.

Each stage is a file with its `run`; compress.py runs them in order and holds the presets. `forecast` in compress.py,
analyze.py and distill.py says what a run would cost, counted by costs.py. workspace.py is the folder, original.py the
model it is made from, options.py the stages' options, weights.py writes transformer/, and modulation.py computes
modulation inputs for several stages.
"""
