"""The experiments behind the tables and figures of this repository."""
