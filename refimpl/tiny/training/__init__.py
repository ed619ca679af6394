"""How the built-in models were trained. The only room that needs torch (the extra `train`)."""
