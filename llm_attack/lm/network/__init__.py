"""What is done to the network itself: hooks, blocks, rotary embeddings, scales."""
