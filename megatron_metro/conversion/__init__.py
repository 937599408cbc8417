"""Models in and out of checkpoints: `whole_model.load_model` makes one model in one process from any layout's step."""
