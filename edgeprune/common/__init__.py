"""Ground floor: what every room may use. Imports nothing else of edgeprune.

errors.py is the tree of exceptions, fields.py checks values of a user's file, files.py reads and writes safely,
hub_cache.py knows huggingface_hub's cache, tensors.py writes safetensors, lock.py locks a folder, stop.py handles
SIGTERM, progress.py reports progress, processes.py knows the other ranks, intervals.py computes statistics,
tables.py and terminal.py format for people, extras.py names missing packages, heap.py returns memory to the system,
pieces.py plans what stays in memory.
"""
