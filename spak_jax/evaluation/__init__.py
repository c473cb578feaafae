"""Scoring trained models, and letting them write."""
