"""Attacks and scales of the kind that a user writes: each in one file."""
