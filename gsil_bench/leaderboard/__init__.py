"""The leaderboard: one file a cell, checked against a schema and against its own items, and two pages made of them."""
