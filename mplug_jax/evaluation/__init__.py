"""Metrics of the tasks, computed with NumPy alone from scores and texts already on the host."""
