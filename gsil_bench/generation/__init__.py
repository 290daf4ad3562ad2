"""Engines that complete prompts, and completions on disk."""
