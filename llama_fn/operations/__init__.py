"""A run seen from outside, by someone who did not start it: is it well, what happened to it, where did its time go.

May import the run and all rooms below it; reads what a run leaves in its work folder, and adds what it says of it.
Read attempts.py first.
"""
