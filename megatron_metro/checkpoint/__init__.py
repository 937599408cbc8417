"""Checkpoints as files: names, publishing, choosing. Knows neither models nor other ranks."""
