"""What only Ascend NPUs need: the machine and its environment variables, and GE graphs as text.

May import the ground and compat. Read environment.py first.
"""
