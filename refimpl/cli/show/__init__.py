"""Results as text for people, a module for each command. May import rich and the data types of lab and files; computes nothing."""
