"""Tests of fedge."""
