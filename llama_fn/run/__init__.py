"""A training run around its step: prepare, restore or begin, then step, log, save; and when to stop.

May import every other room but tools. Read loop.py first: it is the run from top to bottom.
"""
