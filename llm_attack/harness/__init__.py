"""The one door to lm-eval."""
