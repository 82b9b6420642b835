"""Evaluation: benchmark rules (pure Python), the grader of small-world pictures, and the commands that run them."""
