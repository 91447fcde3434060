"""Batches of questions through the clean model and through every condition."""
