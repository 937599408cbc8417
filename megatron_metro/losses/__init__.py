"""Loss terms: tensors in, sums and counts out."""
