"""Ground floor: errors, files, checked fields, locks, signals, processes, statistics.

Imports nothing else of edgeprune.
"""
