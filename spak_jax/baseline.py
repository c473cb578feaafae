"""What the original, the baseline, published: its table, and what the columns of that hold."""

# Its columns by their names: lengths from and to, both included. The names say less than they hold.
COLUMNS = {"1-4": (1, 4), "5-6": (5, 7), "8": (8, 9), "10": (10, 11), "12": (12, 12)}
# The same in words, such as `5-7` for the column `5-6`.
COLUMN_LENGTHS = {
    name: f"{first}-{last}" if first < last else f"{first}"
    for name, (first, last) in COLUMNS.items()
}

# Its table in percent, in the order of the columns, by (config.name, loops).
PUBLISHED = {
    ("gpt12", None): (100.0, 61.90, 0.0, 0.0, 0.0),
    ("loop12", 12): (100.0, 80.00, 0.0, 0.0, 0.0),
    ("loop30", 30): (100.0, 95.24, 2.59, 0.0, 0.0),
    ("loop128e", 24): (100.0, 76.19, 0.0, 0.0, 0.0),
    ("loop12", 24): (100.0, 78.10, 0.0, 0.0, 0.0),
}
