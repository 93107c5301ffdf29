"""What a run needs around the model: state, step, optimiser, checkpoints, metrics and reports."""
