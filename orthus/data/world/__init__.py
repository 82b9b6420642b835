"""The small world: procedural scenes with exact truth, their pictures, texts, splits and benchmark items."""
