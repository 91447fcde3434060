"""From rows to numbers: accuracies, tests, pairs, the worst case."""
