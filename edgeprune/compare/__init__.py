"""Several methods at one budget: `grid.py` says which, `run.py` runs them, `summary.py` sums up, `page.py` shows it."""
