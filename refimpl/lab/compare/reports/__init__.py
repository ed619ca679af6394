"""A comparison as a picture, a page, and for CI; all that comes from files is escaped. May import the rest of lab/compare."""
