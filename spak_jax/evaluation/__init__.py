"""Scoring: what a trained model answers, how often it is right, and how it comes to that."""
