"""What people look at: landscapes, sensitivities, summaries, self-tests."""
