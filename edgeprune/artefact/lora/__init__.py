"""LoRAs of the original for the pruned model: read any trainer's file, then write a LoRA for it or merge the weights.

names.py finds the layer that a file means; reading.py reads a file and accounts for each of its tensors; remap.py makes
a LoRA file for the pruned model; merging.py computes what a LoRA changes in each weight.
"""
