"""Training data.

sources/ read what users have, encoder.py encodes it, and encode.py makes a cache of it under the settings of
settings.py. cache.py maps a cache, buckets.py chooses sizes, pairs.py draws batches, and imagefolder.py reads
images with metadata.
"""
