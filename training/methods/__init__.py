"""Training methods: one method, one file."""
