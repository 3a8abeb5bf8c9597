"""What to run: entry points, the command line and the shipped configurations."""
