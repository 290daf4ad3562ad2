"""Reference log-probs, batches and the one training loop. Never imports evaluation."""
