"""Where a model's weights are.

model_files.py says which files are the model, weights.py reads weights, shards.py writes them, stored.py runs a model
whose weights are on disk.
"""
