"""How the built-in models were trained. The only room that needs torch (the extra `train`)."""

import importlib.util
import sys

if importlib.util.find_spec("torch") is None:
    from refimpl.extras import MissingExtra, require

    try:
        require("torch", "train")
    except MissingExtra as e:
        if sys.argv[0] == "-m":         # python -m refimpl.tiny.training.qat
            sys.exit(f"refimpl: {e}")
        raise
