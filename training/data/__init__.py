"""Data: where images lie, in which order batches take them, and what is known of each."""
