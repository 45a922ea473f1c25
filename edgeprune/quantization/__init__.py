"""INT4 and INT8 weights.

precision.py says how many bits each tensor gets, int4.py holds the quantised layer and its custom op, quantize.py runs
NNCF, feedback.py makes up for rounding errors, and awq.py scales channels first. inputs.py watches what layers get.
"""
