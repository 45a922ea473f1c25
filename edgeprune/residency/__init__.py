"""Where a model's weights are.

weights.py reads folders of weights, shards.py writes them, stored.py runs a model whose weights are on disk.
"""
