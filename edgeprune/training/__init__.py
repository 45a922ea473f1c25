"""Distillation.

distill.py is the loop, recipe.py its options, losses.py its objective, levels.py its noise levels. features.py catches
what blocks compute, prefix.py shares the frozen blocks, rounding.py rounds weights while training, teaching.py lowers
the teacher's precision. parallel.py runs in several processes, zero.py with DeepSpeed, launch.py starts them;
rank_memory.py forecasts what each holds, and resume.py keeps the state on disk.
"""
