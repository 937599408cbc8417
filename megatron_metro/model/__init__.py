"""The chain of units: generator, encoder and decoder with their heads."""
