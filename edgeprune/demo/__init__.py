"""The teachers: `assets/teacher` is the built-in one, `train` makes all, evaluate.py scores."""
