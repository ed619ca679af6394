"""A model ready to use: file, configuration, weights and tokenizer together."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import numpy as np

from refimpl.formats.gguf import GGUFError
from refimpl.formats.matrix import Matrix, StoredMatrix
from refimpl.formats.quants.blocks import BLOCKS
from refimpl.formats.source import TensorSource, Unchanged, releasing
from refimpl.host import available
from refimpl.kernels.cores.threads import prepare
from refimpl.loading.hub import local
from refimpl.loading.memory import needed, parts_of, products_of, refuse_context_unless_it_fits, refuse_unless_it_fits
from refimpl.loading.open import open_model
from refimpl.loading.prepared import CACHE_DISK, InMemory, preparer
from refimpl.loading.residency import lock_in_memory
from refimpl.model import gemma4
from refimpl.model.backend import ARITHMETIC, Backend, Prepared, kernel_backend, reference_backend
from refimpl.model.cache import Cache
from refimpl.model.config import AttentionType, Config, MoeFfn, config_from_gguf, warn_of_unknown_keys
from refimpl.model.soft import NO_SOFT, Soft
from refimpl.model.tap import Look, no_tap, tap_of
from refimpl.model.weights import Weights, prepare_weights, vocabulary_size, weights_from_gguf
from refimpl.progress import Advance, Progress, silent
from refimpl.text.prompt import Encoded, Projector, Prompt, encode_prompt
from refimpl.text.tokenizer import Tokenizer

BUILT_IN = local("built-in")
FIRST_CONTEXT = 4096                      # tokens of context that `load` checks memory for by default
CHUNK = 512                               # rows of a prompt in one call
MOST_ROWS = 1120                          # rows of a picture, which may have to be in one
KEEP_FLOAT32_BELOW = 512 << 20            # bytes of float32 weights that `weights="auto"` holds in memory


class Model:
    """A Gemma 4 text model. `load` makes one."""

    def __init__(self, file: TensorSource, config: Config, weights: Weights, tokenizer: Tokenizer, backend: Backend,
                 held_as_float32: Mapping[str, list[str]], cache_disk: int, preparing: InMemory):
        self.file, self.config, self.weights, self.tokenizer, self.backend = file, config, weights, tokenizer, backend
        self.held_as_float32 = held_as_float32      # type -> names of tensors that the kernels cannot read as stored
        self.cache_disk, self._preparing = cache_disk, preparing        # the former as given to `load`
        self._unchanged = Unchanged(file.files())

    @property
    def name(self) -> str:
        """What the file calls itself."""
        return str(self.file.metadata.get("general.name", self.file.path.stem))

    def __repr__(self) -> str:
        c, b, n_bytes = self.config, self.backend, Counter()
        for info in self.file.tensors.values():
            n_bytes[info.type] += info.n_bytes
        n_full = sum(layer.attention is AttentionType.FULL for layer in c.layers)
        moe = next((f", {layer.ffn.n_expert} experts/{layer.ffn.n_used} used" for layer in c.layers if isinstance(layer.ffn, MoeFfn)), "")
        mix = ", ".join(f"{name} {n / n_bytes.total():.0%}" for name, n in n_bytes.most_common(3))
        return (f"<Model {self.name}: {c.n_layer} layers ({n_full} full), width {c.n_embd}{moe}, vocabulary {c.n_vocab}; bytes {mix}; "
                f"{b.name}, {b.arithmetic}, {b.threads} thread{'s' if b.threads > 1 else ''}>")

    @property
    def notes(self) -> tuple[str, ...]:
        """What `load` has to say about the weights on the disk and in memory, in lines."""
        return tuple(self._preparing.notes)

    @property
    def mapped(self) -> Collection[str]:
        """Names of the matrices that are mapped from the disk and take no memory of this process."""
        return self._preparing.mapped

    def wait_until_kept(self):
        """Returns when nothing is being written any more: for measurements."""
        self._preparing.wait()

    def new_cache(self, n_ctx: int | None = None, keep: int = 0) -> Cache:
        """An empty cache for `n_ctx` positions, the model's whole context when None; `keep` as in Cache."""
        return Cache(self.config, self.config.n_ctx if n_ctx is None else n_ctx, MOST_ROWS, self.backend.kv_type, keep)

    def refuse_unless_it_fits(self, n_ctx: int):
        """Raises MemoryRefusal where there is no room for the keys and values of `n_ctx` tokens."""
        refuse_context_unless_it_fits(self.config, n_ctx, CHUNK, self.backend.kv_type, available(), self.file.path)

    def prefill(self, ids: Sequence[int], cache: Cache, tap: Look = no_tap, advance: Advance = lambda n: None,
                soft: Soft = NO_SOFT) -> np.ndarray:
        """Runs `ids` after what the cache holds, chunk by chunk, and commits them. Returns the final normed states, float32 (T, D).

        `tap(name, array)` is called with every named value (model/tap.py), `advance(n)` after every chunk of n tokens.
        `soft`: what negative ids stand for.
        """
        ids_T = self.checked(ids, soft)
        states = []
        for part in soft.chunks(ids_T, min(CHUNK, cache.max_rows)):
            states.append(self.forward(part, cache, tap, soft))
            cache.advance(len(part))
            advance(len(part))
        return np.concatenate(states)

    def forward(self, ids_T: np.ndarray, cache: Cache, tap: Look = no_tap, soft: Soft = NO_SOFT) -> np.ndarray:
        """The final normed states of `ids_T` (as from `checked`) after what the cache holds, float32 (T, D).

        Does not commit them: `cache.advance(n)` commits the first n. Raises GGUFError where the file was changed since it was opened.
        """
        return self.forward_together(ids_T, [(cache, len(ids_T))], tap, soft)

    def forward_together(self, ids_T: np.ndarray, sequences: Sequence[tuple[Cache, int]], tap: Look = no_tap,
                         soft: Soft = NO_SOFT) -> np.ndarray:
        """The same for rows of several sequences: (cache, number of rows) of each, in order. No row's bits depend on the others."""
        self._unchanged.check()
        with self.backend.running(len(ids_T)):
            return gemma4.forward(self.config, self.weights, self.backend, ids_T, sequences, tap_of(tap), soft)

    def head(self, state_TD: np.ndarray) -> np.ndarray:
        """Logits of states, float32 (T, V)."""
        with self.backend.running(len(state_TD)):
            return gemma4.head(self.config, self.weights, self.backend, state_TD)

    def encoded(self, prompt: Prompt, projector: Projector | None = None, special: bool = False) -> Encoded:
        """The ids of a prompt in any form (text/prompt.py: `encode_prompt`). Raises ChatError or ValueError."""
        return encode_prompt(self.tokenizer, self.file.metadata.get("tokenizer.chat_template"), prompt, projector, special)

    def logits(self, prompt: Prompt, tap: Look = no_tap, projector: Projector | None = None) -> np.ndarray:
        """The logits at every position, float32 (T, V), from an empty cache. `prompt` in any form (text/prompt.py): ids, text, parts. `tap`
        as in `prefill`; a `projector` (loading/projector.py) for pictures and sounds.
        """
        encoded = self.encoded(prompt, projector)
        logit_TV = self.head(self.prefill(encoded.ids, self.new_cache(), tap, soft=encoded.soft))
        tap("result_output", logit_TV)
        return logit_TV

    def checked(self, ids: Sequence[int], soft: Soft = NO_SOFT) -> np.ndarray:
        """`ids` as int64 (T,). Raises ValueError for an empty list or an id that is neither in the vocabulary nor in `soft`."""
        ids_T = np.asarray(ids)
        if ids_T.ndim != 1 or not len(ids_T) or ids_T.dtype.kind not in "iu":
            raise ValueError("expected a list of at least one token id" + (", integers" if ids_T.ndim and len(ids_T) else ""))
        outside = [int(i) for i in ids_T[(ids_T < 0) | (ids_T >= self.config.n_vocab)] if int(i) not in soft.place]
        if outside:
            raise ValueError(f"token id {outside[0]} is outside of the vocabulary (0 to {self.config.n_vocab - 1})")
        return ids_T.astype(np.int64)


def load(path: str | os.PathLike | None = None, *, backend: str = "kernels", arithmetic: str | None = None, threads: int | None = None,
         weights: str = "auto", n_ctx: int | None = None, cache_disk: int = CACHE_DISK, lock: bool = False,
         progress: Progress = silent) -> Model:
    """Loads a Gemma 4 model: a GGUF file, a Hugging Face directory (safetensors, not quantized or W4A16), or `hf:owner/name`, which is
    downloaded first (loading/hub.py). Without a path: the small model that ships; "built-in:e2b" is the other one.

    backend     "kernels" (Numba, on `threads` threads, by default one for each physical core) or "reference" (NumPy, one thread)
    arithmetic  "q8": activations are quantized to 8 bits before they are multiplied with quantized weights, as in ggml (default of the
                kernels). "exact": float32 throughout (default of the reference). Weights of types without integer arithmetic here (IQ1 to
                IQ3, TQ, NVFP4, ...) are multiplied exactly in both, and the kernels hold them as float32 (`Model.held_as_float32`).
    weights     how the reference holds them: "quantized", as in the mapped file, dequantized at each use; "float32", dequantized once,
                for exact arithmetic only; "auto", float32 where that takes less than 512 MiB and the arithmetic allows it
    n_ctx       how many tokens of context to make sure of memory for; by default 4,096, or the model's own context where it is smaller.
                `generate` and `stream` check again, for the tokens that they are asked for.
    cache_disk  bytes that rearranged weights may take on the disk (below), those of all models together; 0: none are read or written
    lock        keep the weights in memory whatever other programs need
    progress    as in refimpl/progress.py

    The kernels rearrange the weights (kernels/machine/tiles.py), once: from the second start on they are mapped from the cache folder
    (prepared.py). `Model.notes` says what came in the way. MemoryRefusal (a ValueError) where neither memory nor disk have room. Warns of
    metadata keys that this version does not know. Raises GGUFError or TokenizerError, with one clear line, for a file that cannot be
    used, HubError for one that cannot be downloaded, ValueError for other arguments.
    """
    arithmetic = {"kernels": "q8", "reference": "exact"}.get(backend) if arithmetic is None else arithmetic
    if backend not in ("kernels", "reference"):
        raise ValueError(f"backend={backend!r}: expected 'kernels' or 'reference'")
    if arithmetic not in ARITHMETIC:
        raise ValueError(f"arithmetic={arithmetic!r}: expected {' or '.join(map(repr, ARITHMETIC))}")
    if backend == "reference" and threads not in (None, 1):
        raise ValueError(f"threads={threads!r}: the reference runs on one thread")
    if weights not in ("auto", "quantized", "float32"):
        raise ValueError(f"weights={weights!r}: expected 'auto', 'quantized' or 'float32'")
    if weights == "float32" and (arithmetic == "q8" or backend == "kernels"):
        raise ValueError("weights='float32' is for the reference in exact arithmetic")
    file = open_model(BUILT_IN if path is None else local(path))
    config = config_from_gguf(file.metadata, file.tensors.keys(), vocabulary_size(file), file.path)
    warn_of_unknown_keys(file.metadata, file.path)
    stored = weights_from_gguf(file, config)
    if backend == "kernels":
        for layer in config.layers:
            if layer.head_dim % 16:
                raise ValueError(f"{file.path}: heads of {layer.head_dim} in layer {layer.index}; the kernels take multiples of 16, "
                                 "backend='reference' (--backend reference) takes any")
        functions = kernel_backend(arithmetic, prepare(threads))
        n_ctx = min(FIRST_CONTEXT if n_ctx is None else n_ctx, config.n_ctx)
        preparing = preparer(file, products_of(stored), functions.prepare, functions.held, cache_disk)
        need = partial(needed, stored, config, n_ctx, CHUNK, functions.kv_type, functions.held)
        preparing.fit(lambda mapped: need(mapped).total, available())
        refuse_unless_it_fits(need(preparing.mapped), available(), file.path)
        held_as_float32 = need().held_as_float32
    else:
        hold = weights == "float32" or weights == "auto" and arithmetic == "exact" and float32_bytes(file) < KEEP_FLOAT32_BELOW
        functions, held_as_float32 = reference_backend(arithmetic, Matrix.dequantized if hold else lambda matrix: matrix), {}
        preparing = InMemory(functions.prepare)
    with functions.running(), progress("MB loaded", file.n_bytes, 10**6) as advance:
        prepared = prepare_weights(stored, with_progress(preparing.prepare, file, advance))
    if lock:
        preparing.notes.append(lock_in_memory(parts_of(prepared)))
    preparing.finish()
    tokenizer = Tokenizer.from_metadata(file.metadata, str(file.path))
    if tokenizer.n_vocab != config.n_vocab:
        raise GGUFError(file.path, None, f"the vocabulary has {tokenizer.n_vocab} tokens, the embedding {config.n_vocab} rows")
    return Model(file, config, prepared, tokenizer, functions, held_as_float32, cache_disk, preparing)


def with_progress(prepare: Callable[[StoredMatrix], Prepared], file: TensorSource, advance: Advance) -> Callable[[StoredMatrix], Prepared]:
    """`prepare` for one matrix after the other: reports the bytes read, and releases the pages of the mapped file every GiB."""
    advance = releasing(file, advance)

    def prepare_and_report(matrix: StoredMatrix) -> Prepared:
        prepared = prepare(matrix)
        advance(matrix.n_bytes)
        return prepared
    return prepare_and_report


def float32_bytes(file: TensorSource) -> int:
    """What all weights would take as float32."""
    return sum(4 * info.n_bytes // BLOCKS[info.type].n_bytes * BLOCKS[info.type].elements for info in file.tensors.values())
