"""Many conditions over many tasks: running them, and the tables of the results."""
