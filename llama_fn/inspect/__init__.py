"""What people look at to understand a graph or a run: dumps of every stage, pages, profiles by scope.

May import the planner and all floors below it. Read dump.py first.
"""
