"""GenEval (arXiv 2310.11513): prompts, verdicts and summaries as published, detectors behind one protocol."""
