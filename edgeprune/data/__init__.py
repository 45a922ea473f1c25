"""Training data.

sources/ reads images and captions, settings.py identifies and sizes a cache, encode.py makes it with encoder.py,
cache.py checks and maps it, pairs.py draws batches from it.
"""
