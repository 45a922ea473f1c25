"""The teachers: `assets/teacher` is the built-in one, teachers.py finds others, `train` trains them, evaluate.py scores."""
