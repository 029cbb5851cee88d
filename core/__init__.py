"""The common vocabulary: parameters, tasks, updates, errors, limits, random numbers, the registry of components.

Knows nobody: it imports no other room, no network library and no machine-learning framework.
"""
