"""What is done to the finished single-device model from outside, and in which order."""
