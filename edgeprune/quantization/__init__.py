"""INT4 weights: int4.py is the layer and its custom op, quantize.py runs NNCF, awq.py scales channels, precision.py
says which tensor gets how many bits."""
