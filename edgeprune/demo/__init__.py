"""The built-in model: `assets/teacher` holds it, `train.py` trained it, `evaluate.py` scores it on shapes world."""
