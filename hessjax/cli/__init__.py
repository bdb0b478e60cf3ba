"""The command `hessjax`."""
