"""Rows that outlive a run."""
