"""Changes and measurements of the network itself: hooks, blocks, rotary embeddings, scales."""
