"""What a trained model makes of text."""
