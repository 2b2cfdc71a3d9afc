"""What a run will take, from its lowered graph alone: memory, time, what goes over the wire; a search for what fits.

May import the compiler and all floors below it. Read plan.py first; config_stages.py makes a configuration's stages.
"""
