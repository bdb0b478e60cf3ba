"""Which weights can go, when, and what the others do about it."""
