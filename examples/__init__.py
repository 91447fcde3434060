"""Examples of attacks and units that users write, each in one file."""
