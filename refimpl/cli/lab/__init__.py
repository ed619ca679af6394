"""The commands of the lab: what measures, compares and judges. They import what the other commands may."""
