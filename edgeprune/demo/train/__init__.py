"""Trains a teacher from scratch: `python -m edgeprune.demo.train NAME`.

recipes.py lists the teachers. A training has three stages, each kept and skipped when done: the VAE (vae.py), rendered
scenes as latents (scenes.py), then text encoders and transformer together (matching.py). Teachers of one world share
the first two. sd3.py and flux.py have the networks, words.py the tokenizers. It trains on CPU, not on several devices.
"""
