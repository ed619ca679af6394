"""What the notebooks compute and draw. May import the rest of lab."""
