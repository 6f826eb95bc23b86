"""The training loop and its parts: step, optimizer, schedule, validation, metrics, profiling."""
