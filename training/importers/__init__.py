"""Importers: foreign checkpoints -> zoo entries."""
