"""A trained model at work: text out of it, and how well it predicts text."""
