"""Campaigns that try to break what is promised.

Run from a checkout, not installed: `python -m reliability.faults`.
"""
