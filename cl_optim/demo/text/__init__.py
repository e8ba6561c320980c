"""``cl-optim demo text``: a byte-level transformer learns English, then Python code."""
