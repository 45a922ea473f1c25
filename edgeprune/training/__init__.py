"""Distillation.

distill.py trains, recipe.py holds its options, losses.py its objective, parallel.py and zero.py distribute it over
processes, resume.py stores its state, launch.py starts the processes, rank_memory.py forecasts their memory.
"""
