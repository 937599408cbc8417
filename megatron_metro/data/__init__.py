"""From text files to microbatches."""
