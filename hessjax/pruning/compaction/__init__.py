"""What of a program can go: it is traced, its axes followed, and what nothing needs left out."""
