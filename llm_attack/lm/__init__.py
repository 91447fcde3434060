"""The lm-eval model `attacked-hf`: hook, packing, scoring, losses, gold labels."""
