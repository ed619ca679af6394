"""What the glass page shows: records of what the forward pass did for a text, as JSON. May import the rest of lab."""
