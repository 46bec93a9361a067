"""Files of embeddings: their table, metadata, schema and formats."""
