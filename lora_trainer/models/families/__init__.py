"""Model families: one module each, found in one table."""
