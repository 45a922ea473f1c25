"""The teachers: `assets/teacher` is the built-in one, teachers.py finds all, `train` makes them, evaluate.py scores."""
