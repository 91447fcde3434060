"""The uncertainty relation, the binary toy (Fig. 4) and word sentiment (Fig. 6)."""
