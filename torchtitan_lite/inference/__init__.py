"""Use a trained model: generate text, and measure how well the model predicts text."""
