"""Code for authors of other engines, which writes files by the convention; printed by `refimpl compare --exporter`. Imports none of us."""
