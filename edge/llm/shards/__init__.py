"""Who holds what, how it is rounded, and the file it lies in."""
