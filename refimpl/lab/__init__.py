"""For people who look into models and engines; each room has a purpose of its own.

May import everything but cli; returns data, prints nothing.
"""
