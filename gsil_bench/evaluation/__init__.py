"""Answers, scores and the statistics of comparisons. Never imports training."""
