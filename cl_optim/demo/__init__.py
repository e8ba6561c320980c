"""``cl-optim demo``: forgetting, and what prevents it, on real data in about a minute."""
