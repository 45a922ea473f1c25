"""What projecting the modulation costs and saves on a teacher: python -m edgeprune.experiments.modulation

`study.py` holds the models and keeps the results, `errors.py` measures velocity errors, `sizes.py` compares ways to
make the model smaller, `tables.py` and `plot.py` show the results. docs/modulation.md quotes them.
"""
