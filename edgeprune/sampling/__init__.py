"""Drawing images with torch: generation settings, prompts, noise levels, denoising.

generation.py and prompts.py are torch-free, since runtimes read them too.
"""
