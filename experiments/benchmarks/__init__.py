"""What `python -m experiments.benchmark` consists of."""
