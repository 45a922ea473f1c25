"""Which parts of a model are removed, within a budget.

plan.py is the plan as data, remainder.py what it leaves of a model, options.py the options, budget.py counts sizes,
methods/ choose the parts, make.py makes the plan, fit.py reads a budget off a device's memory, and modulation.py finds
the subspace that modulation is projected to.
"""
