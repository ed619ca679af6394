"""From logits to tokens: sampling, the plain loop, drafting. May import loading; prints nothing."""
