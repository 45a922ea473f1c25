"""Memory, latency and quality of several models, each measured in a fresh process: measure.py starts worker.py."""
