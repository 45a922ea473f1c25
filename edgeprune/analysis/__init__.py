"""What each part of a model contributes.

contribution.py scores removals, estimators/ obtain the scores, plots.py draws them.
"""
