"""Pipelines: the graph of one device, cut into a program for each stage (sharding/schedules.py says in what order)."""
