"""The training loop and its parts: state, step, optimizer, schedule, validation, hooks."""
