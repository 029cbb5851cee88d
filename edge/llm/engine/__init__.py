"""Many requests at a time: what a pass holds, which token follows, who gets it."""
