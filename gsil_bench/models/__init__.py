"""Checkpoints and the one way from logits to log-probs."""
