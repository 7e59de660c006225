"""Models to run: the demo decoder and how it was made."""
