"""``python -m bench.retention text``: a byte-level transformer learns English, then Python code."""
