"""Many conditions over many tasks: what is run, and the tables of what came out."""
