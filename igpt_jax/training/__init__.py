"""Training: optimizer, steps, the loop."""
