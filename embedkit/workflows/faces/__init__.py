"""Faces in photographs: `finder` (detection and landmarks), `alignment` (the upright chip), `encoder` (embeddings)."""
