"""Results files as figures and tables."""
