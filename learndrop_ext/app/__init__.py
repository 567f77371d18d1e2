"""The command line: models, datasets, runs and their report."""
