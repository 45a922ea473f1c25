"""INT4 and INT8 weights.

precision.py says how many bits each tensor gets, int4.py holds the quantised layer and its custom op, quantize.py runs
NNCF, and feedback.py makes up for rounding errors.
"""
