"""Evaluation: one protocol for every encoder, its metrics and baselines, and how they are written into an entry."""
