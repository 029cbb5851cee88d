"""The control plane of a group of ranks: who is there, which shard each holds, and what happens when one is gone."""
