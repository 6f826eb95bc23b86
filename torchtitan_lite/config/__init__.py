"""The generic configuration loader (`load`), and the configuration of a training run (`job`)."""
