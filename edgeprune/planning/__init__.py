"""What goes, within a budget: plan.py is the plan, planners/ and baselines/ choose, fit.py reads a device's memory,
modulation.py projects the modulation input."""
