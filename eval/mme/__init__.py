"""MME (arXiv 2306.13394): reading its data, asking, answer files in the published form, and grading them."""
