"""What is in a checkpoint: names, headers, and indexes, read and checked before any value is."""
