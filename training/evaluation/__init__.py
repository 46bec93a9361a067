"""Evaluation: one protocol for every encoder, and the way of its metrics into an entry."""
