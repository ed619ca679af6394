"""The model and the drafter that ship, and what they were measured by. May import everything; nobody imports it."""
