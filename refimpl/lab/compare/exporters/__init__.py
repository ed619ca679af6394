"""Code for authors of other engines, which writes files by the convention; printed by `refimpl compare --exporter`. May import nothing."""
