"""Contests: methods that are compared where each is tuned for itself, at equal numbers of examples."""
