"""Sampling images with torch: generation settings, prompts, noise levels and denoising.

generation.py (default settings) and prompts.py (lists of prompts) do not load torch, since the runtimes read them too;
denoising.py (encode, denoise, decode) does.
"""
