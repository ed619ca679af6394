"""Pictures and sounds in traces: what towers are given, and bugs of theirs. May import what lab/compare may."""
