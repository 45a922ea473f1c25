"""Several methods at one budget: grid.py runs them, page.py writes the table and the plot."""
