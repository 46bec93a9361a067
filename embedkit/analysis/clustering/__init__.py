"""Which embeddings belong together, and how well that agrees with labels."""
