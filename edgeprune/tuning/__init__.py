"""Finds a folder's settings with the fewest evaluations within a bound of quality: `edgeprune tune`.

bounds.py says how much worse a choice may be, search.py what to try next. trials.py draws and scores it with any
runtime and keeps the figures. Torch is needed only by runtimes and metrics that are made of it.
"""
