"""Gemma 4 inference from scratch: NumPy for the formulas, Numba for the speed, one forward pass over both.

    model = refimpl.load("model.gguf")                   # or a Hugging Face directory, or "hf:owner/name"; nothing: the model that ships
    model = refimpl.load("model.gguf", backend="reference")                     # the formulas, in NumPy

    ids = model.tokenizer.encode("def main():")          # list of int; model.tokenizer.decode(ids) -> str
    logits = model.logits(ids)                           # float32 (tokens, vocabulary)

    drafter = refimpl.load_drafter("mtp.gguf", target=model)                    # faster, same text
    print(refimpl.generate(model, ids, max_new_tokens=64, drafter=drafter).text)
    for text in refimpl.stream(model, ids):
        print(text, end="", flush=True)

    eyes = refimpl.load_projector("mmproj.gguf", target=model)                  # pictures and sounds
    print(refimpl.generate(model, ["What is ", refimpl.Image("cat.png"), "?"], projector=eyes).text)

    session = model.session()                            # a conversation: what was read once is not read again
    print(session.chat("What is a monad?").text)

Errors are one line: GGUFError (CheckpointError, TokenizerError, ChatError) for a file or template that cannot be used, HubError for a
download, MemoryRefusal and ContextFull where something does not fit, ValueError for an argument.
"""

from refimpl.decode.drafter import Drafter, load_drafter, propose
from refimpl.decode.generate import Output, generate, stream
from refimpl.decode.request import Stats
from refimpl.decode.session import Session
from refimpl.extras import MissingExtra
from refimpl.formats.gguf import GGUFError
from refimpl.formats.safetensors import CheckpointError
from refimpl.loading.hub_files import HubError
from refimpl.loading.memory import MemoryRefusal
from refimpl.loading.model import Model, load
from refimpl.loading.projector import Projector, load_projector
from refimpl.media.parts import Audio, Image, Video
from refimpl.media.source import MediaError
from refimpl.model.cache import ContextFull
from refimpl.text.chat import ChatError
from refimpl.text.tokenizer import Tokenizer, TokenizerError

__version__ = "0.1.0"
__all__ = ["Audio", "ChatError", "CheckpointError", "ContextFull", "Drafter", "GGUFError", "HubError", "Image", "MediaError",
           "MemoryRefusal", "MissingExtra", "Model", "Output", "Projector", "Session", "Stats", "Tokenizer", "TokenizerError", "Video",
           "generate", "load", "load_drafter", "load_projector", "propose", "stream"]
