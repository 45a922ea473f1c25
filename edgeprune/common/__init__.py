"""The ground floor: errors, files, checked fields, locks, signals, progress, processes, statistics.

This room imports no other room of edgeprune.
"""
