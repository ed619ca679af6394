"""The model and the drafter that ship, and how they are measured. May import everything but `training`; nothing imports it."""
