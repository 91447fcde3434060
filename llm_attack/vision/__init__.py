"""The image experiments, Fig. 1, 2 and 5: data, networks, training, attacks."""
