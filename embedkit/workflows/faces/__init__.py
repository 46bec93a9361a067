"""Faces in photographs: found, aligned, embedded."""
