"""A language model between a device and a cloud: early exits answer here, the cloud continues the rest."""
