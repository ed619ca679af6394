"""Tools for people who look into models and engines."""
