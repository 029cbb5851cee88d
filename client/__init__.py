"""The device runtime: data sets and partitions, trainers, and the loop that fetches tasks and sends updates.

Never imports `fedge.server`.
"""
