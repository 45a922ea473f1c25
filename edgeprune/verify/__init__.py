"""`edgeprune verify`: whether a model computes here what its files say, on whatever weights the user has.

subject.py runs each network once as edgeprune runs it, and once as reference.py does: diffusers' and transformers' own
classes and pipelines in float32, with weights that edgeprune's loaders have not touched. The files of checks/ judge the
results. Both sides stream the networks, so models larger than memory can be verified.
"""
