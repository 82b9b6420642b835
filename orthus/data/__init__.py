"""Data: what an example is, and where examples come from."""
