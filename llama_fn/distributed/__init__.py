"""One process per device: groups along mesh axes, arrays taken apart and put together, and who is missing.

May import the ground, compat and the declarations of arrays. Read processes.py first.
"""
