"""What the commands about files do: convert, inspect, synth, verify. May import loading; returns data, prints nothing."""
