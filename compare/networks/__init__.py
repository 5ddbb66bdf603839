"""The trained upper part of each model, for a whole cohort at once."""
