"""From a function over trees to code that runs: trace, lower, compile; passes over graphs; backends.

May import the ground, compat, ascend, distributed, and of the maths only the declarations of arrays. Read stages.py
first: everything else here serves its stages.
"""
