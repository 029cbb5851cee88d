"""Scripts for those who work on fedge itself."""
