"""Early exits: when one may answer, how far it can be trusted, and how to train it."""
