"""One rank's forward pass: attention over cached keys and values, feed-forward, and rank 0's head."""
