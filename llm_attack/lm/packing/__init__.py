"""Questions as tensors: tries, positions, prefixes, batches, packs."""
