"""Distillation.

distill.py is the loop, recipe.py its options, parallel.py several processes, resume.py its state on disk.
"""
