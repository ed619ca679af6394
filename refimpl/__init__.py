"""Gemma 4 inference from scratch: NumPy for the formulas.

    model = refimpl.load("model.gguf")
    ids = model.tokenizer.encode("def main():")
    print(refimpl.generate(model, ids, max_new_tokens=64).text)
"""

from refimpl.decode.drafter import Drafter, load_drafter, propose
from refimpl.decode.generate import Output, Stats, generate, stream
from refimpl.formats.gguf import GGUFError
from refimpl.loading.hub_files import HubError
from refimpl.loading.model import Model, load
from refimpl.model.cache import ContextFull
from refimpl.text.tokenizer import TokenizerError

__version__ = "0.1.0"
__all__ = ["ContextFull", "Drafter", "GGUFError", "HubError", "Model", "Output", "Stats", "TokenizerError", "generate", "load",
           "load_drafter", "propose", "stream"]
