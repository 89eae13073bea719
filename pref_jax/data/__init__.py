"""From files and objects to token groups, rows and batches."""
