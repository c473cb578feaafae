"""What times ours against peers, and one device against several.

Run from a checkout, not installed: `python -m benchmarks.models CONFIG`.
"""
