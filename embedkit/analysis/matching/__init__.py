"""Whether two embeddings show one identity: pairs, error rates, calibrations, identification."""
