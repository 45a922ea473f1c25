"""Training data.

sources/ read what users have, encode.py makes a cache of it, cache.py maps a cache, pairs.py draws batches.
"""
