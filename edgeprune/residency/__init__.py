"""Where a model's weights are: weights.py reads and writes folders of shards, stored.py runs a model from disk."""
