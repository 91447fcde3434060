"""Carrying out a plan: work, store, processes, progress, and the rows of the result."""
