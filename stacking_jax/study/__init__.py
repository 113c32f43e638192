"""Studies: a grid of runs, methods × seeds × budgets, its statistics, and its report.

Importing this package loads neither jax nor gin nor matplotlib.
"""
