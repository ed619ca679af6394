"""A projector ready to use: the part of a model that turns images and sound into soft tokens, which the text model takes."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from refimpl.formats.gguf import GGUFError
from refimpl.formats.hashing import sample_hash
from refimpl.formats.matrix import Matrix, StoredMatrix
from refimpl.formats.quants.codecs import quantize
from refimpl.formats.source import TensorSource, Unchanged
from refimpl.host import available
from refimpl.kernels.cores.threads import prepare
from refimpl.loading.hub import built_in_with, local
from refimpl.loading.memory import MemoryRefusal, products_of, tower_bytes, weight_bytes
from refimpl.loading.model import BUILT_IN, Model, with_progress
from refimpl.loading.prepared import CACHE_DISK, InMemory, preparer
from refimpl.loading.towers.directory import open_projector
from refimpl.loading.towers.names import type_in_projector
from refimpl.media.mel import SUBSAMPLING, mel_frames, raw_frames
from refimpl.media.parts import Audio, Image, Still, Video
from refimpl.media.patches import TOKENS, patches
from refimpl.media.source import MediaError
from refimpl.model.backend import ARITHMETIC, Backend, kernel_backend, reference_backend
from refimpl.model.config import warn_of_unknown_keys
from refimpl.model.soft import SoftTokens
from refimpl.model.tap import Look, no_tap, tap_of
from refimpl.model.towers import conformer, unified, vision
from refimpl.model.towers.config import POOL, CellConfig, ProjectorConfig, SoundFrameConfig, VisionConfig, projector_config_from_gguf
from refimpl.model.towers.weights import FLOATS, ProjectorWeights, projector_weights_from_gguf
from refimpl.model.weights import prepare_matrices
from refimpl.progress import Progress, silent

BUILT_IN_PROJECTOR = BUILT_IN.with_name("mmproj.gguf")
KEPT_BYTES = 128 << 20      # of soft tokens of the latest pictures and sounds


class Projector:
    """The part of a Gemma 4 model that sees and hears. `load_projector` makes one.

    config   its `vision` is a VisionConfig (an encoder) or a CellConfig (none: the 12B), None where it does not see; its `audio` a
             ConformerConfig or a SoundFrameConfig, None where it does not hear
    target   the text model that takes the soft tokens; None: it is on its own
    """

    def __init__(self, file: TensorSource, config: ProjectorConfig, weights: ProjectorWeights, backend: Backend, preparing: InMemory,
                 target: Model | None, stored: str = "stored"):
        self.file, self.config, self.weights, self.backend, self.target = file, config, weights, backend, target
        self._kept: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._identity = f"{sample_hash(file.files())} {backend.name} {backend.arithmetic} {stored}"
        self._preparing, self._unchanged = preparing, Unchanged(file.files())

    @property
    def name(self) -> str:
        """What the file calls itself."""
        return str(self.file.metadata.get("general.name", self.file.path.stem))

    @property
    def n_embd(self) -> int:
        """Width of a soft token, that of the text model."""
        return self.config.n_out

    @property
    def sees(self) -> bool:
        """Does it take images?"""
        return self.config.vision is not None

    @property
    def hears(self) -> bool:
        """Does it take sound?"""
        return self.config.audio is not None

    @property
    def encoder_free(self) -> bool:
        """Is it the 12B's, which takes cells of pixels and frames of samples instead of patches and mel frames?"""
        return isinstance(self.config.vision, CellConfig) or isinstance(self.config.audio, SoundFrameConfig)

    @property
    def notes(self) -> tuple[str, ...]:
        """What `load_projector` has to say about the weights on the disk and in memory, in lines."""
        return tuple(self._preparing.notes)

    def __repr__(self) -> str:
        parts = [type(part).__name__.removesuffix("Config") for part in (self.config.vision, self.config.audio) if part]
        b = self.backend
        return f"<Projector {self.name}: {' and '.join(parts)}, width {self.n_embd}; {b.name}, {b.arithmetic}, threads {b.threads}>"

    @property
    def squares(self) -> tuple[int, int]:
        """Pixels of the side of a patch (12B: a cell), and patches of the side of a soft token."""
        return self.config.vision.side, 1 if isinstance(self.config.vision, CellConfig) else POOL

    @property
    def frames_per_token(self) -> int:
        """Frames of a sound that become a soft token; the last one may have fewer."""
        return 1 if isinstance(self.config.audio, SoundFrameConfig) else SUBSAMPLING

    def image(self, source: object, tokens: int = TOKENS) -> np.ndarray:
        """The soft tokens of a picture as they enter the text model, float32 (n, D). `source` and `tokens` as in Image, or an Image.

        Raises MediaError (a ValueError) for what cannot be opened, and where the projector does not see.
        """
        return self.image_tokens(*self.given(source if isinstance(source, Image) else Image(source, tokens)))

    def audio(self, source: object) -> np.ndarray:
        """The soft tokens of a sound, float32 (n, D). `source` as in Audio, or an Audio. Raises as `image` does."""
        return self.audio_tokens(*self.given(source if isinstance(source, Audio) else Audio(source)))

    def given(self, part: Image | Audio) -> tuple[np.ndarray, ...]:
        """What the tower takes: (patches, positions) of a picture, (frames,) of a sound. Raises as `image` does."""
        self._refuse_unless_it_takes(part)
        if isinstance(part, Image):
            return patches(part.scaled(*self.squares), self.squares[0])
        raw = isinstance(self.config.audio, SoundFrameConfig)
        return (raw_frames(part.samples_N, self.config.audio.n_samples) if raw else mel_frames(part.samples_N, part.name),)

    def soft_tokens(self, part: Image | Audio) -> SoftTokens:
        """What a prompt has in the place of a picture or a sound. It is opened here, and computed only when the model reads it: not where
        it has been read before. Raises as `image` does, and where the projector was loaded without its target.
        """
        if self.target is None:
            raise ValueError(f"{self.file.path} was loaded without the model that takes its tokens: load_projector(path, target=model)")
        self._refuse_unless_it_takes(part)
        digest = hashlib.sha256(f"{self._identity} {part.digest}".encode()).digest()
        if isinstance(part, Audio):
            [frames_TM] = self.given(part)
            n = -(-len(frames_TM) // self.frames_per_token)
            return SoftTokens(digest, n, False, lambda look: self._once(digest, lambda: self.audio_tokens(frames_TM, look)))
        self._refuse_unless_it_fits(part)
        return SoftTokens(digest, part.n_tokens(*self.squares), self.target.config.looks_ahead_in_images,
                          lambda look: self._once(digest, lambda: self.image_tokens(*self.given(part), look)))

    def stills(self, video: Video) -> tuple[Still, ...]:
        """The frames of a video as pictures. Raises as `image` does, and MissingExtra where PyAV is not installed."""
        self._refuse_unless_it_takes(video)
        return video.stills(*self.squares)

    def _refuse_unless_it_takes(self, part: Image | Audio | Video):
        tower, verb = (self.config.audio, "hear") if isinstance(part, Audio) else (self.config.vision, "see")
        if tower is None:
            raise MediaError(part.name, f"{self.file.path} does not {verb}")

    def _refuse_unless_it_fits(self, image: Image):
        """Now, and not when the model reads it: a ribbon has more squares along a side than a tower has positions."""
        n_rows, n_columns = (side // self.config.vision.side for side in image.size(*self.squares))
        if max(n_rows, n_columns) > (most := self.config.vision.n_positions):
            raise MediaError(image.name, f"becomes {n_columns} x {n_rows} squares, and this projector has {most} positions in each "
                             "direction; cut it into pieces")

    def _once(self, digest: bytes, make: Callable[[], np.ndarray]) -> np.ndarray:
        """What was made last is kept."""
        if digest not in self._kept:
            self._kept[digest] = make()
        self._kept.move_to_end(digest)
        while len(self._kept) > 1 and sum(rows.nbytes for rows in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return self._kept[digest]

    def image_tokens(self, patches_TP: np.ndarray, pos_T2: np.ndarray, tap: Look = no_tap) -> np.ndarray:
        """The soft tokens of one image, row by row, float32 (n, D).

        patches_TP  float32 (T, 3 * side^2), 0 to 1, in the order (row, column, channel): patches of 16 pixels, 9 of them a soft token; for
                    a projector without an encoder cells of 48 pixels
        pos_T2      int64 (x, y) of each, row by row, without gaps

        Raises ValueError for anything else, and for a projector that does not see. `tap` as in `Model.prefill`.
        """
        if self.config.vision is None:
            raise ValueError(f"{self.file.path}: this projector does not see")
        cells = isinstance(self.config.vision, CellConfig)
        _check_image(patches_TP, pos_T2, self.config.vision, self.squares[1])
        self._unchanged.check()
        tower = unified if cells else vision
        with self.backend.running(len(patches_TP)):
            return tower.image_tokens(self.config.vision, self.weights.vision, self.backend, patches_TP, pos_T2, tap_of(tap))

    def audio_tokens(self, frames_TM: np.ndarray, tap: Look = no_tap) -> np.ndarray:
        """The soft tokens of one clip, float32 (n, D): one of four mel frames (the last of one to four), float32 (T, 128); of a projector
        without an encoder one of each frame of 640 samples, float32 (T, 640), -1 to 1.

        Raises ValueError for anything else, and for a projector that does not hear.
        """
        if self.config.audio is None:
            raise ValueError(f"{self.file.path}: this projector does not hear")
        raw = isinstance(self.config.audio, SoundFrameConfig)
        width = self.config.audio.n_samples if raw else self.config.audio.n_mel
        if frames_TM.dtype != np.float32 or frames_TM.ndim != 2 or frames_TM.shape[1] != width or not len(frames_TM):
            raise ValueError(f"expected at least one frame of {width} numbers in float32, got {frames_TM.dtype} of shape {frames_TM.shape}")
        self._unchanged.check()
        tower = unified if raw else conformer
        with self.backend.running(len(frames_TM)):
            return tower.audio_tokens(self.config.audio, self.weights.audio, self.backend, frames_TM, tap_of(tap))


def _check_image(patches_TP: np.ndarray, pos_T2: np.ndarray, config: VisionConfig | CellConfig, multiple: int):
    """Raises ValueError unless these are all the squares of a picture whose sides are a multiple of so many."""
    width = 3 * config.side ** 2
    if patches_TP.dtype != np.float32 or patches_TP.ndim != 2 or patches_TP.shape[1] != width or not len(patches_TP):
        raise ValueError(f"expected at least one square of {width} numbers in float32, got {patches_TP.dtype} of shape {patches_TP.shape}")
    if pos_T2.dtype != np.int64 or pos_T2.shape != (len(patches_TP), 2):
        raise ValueError(f"expected {len(patches_TP)} positions (x, y) in int64, got {pos_T2.dtype} of shape {pos_T2.shape}")
    n_columns, n_rows = (int(n) + 1 for n in pos_T2.max(axis=0))
    if max(n_columns, n_rows) > config.n_positions:
        raise ValueError(f"{n_columns} x {n_rows} squares, and the projector has {config.n_positions} positions in each direction")
    if n_columns * n_rows != len(pos_T2) or n_columns % multiple or n_rows % multiple or not np.array_equal(
            pos_T2, np.stack(np.divmod(np.arange(len(pos_T2)), n_columns)[::-1], axis=-1)):
        raise ValueError(f"expected the positions of {len(pos_T2)} squares row by row, without gaps, both sides multiples of {multiple}")


def load_projector(path: str | os.PathLike | None, target: Model | None = None, *, backend: str | None = None,
                   arithmetic: str | None = None, threads: int | None = None, weights: str = "stored", cache_disk: int = CACHE_DISK,
                   progress: Progress = silent) -> Projector:
    """Loads a projector: a GGUF file (mmproj), a model's Hugging Face directory, or `hf:owner/name:file`, which is downloaded first;
    without a path, that of the built-in model. A repository without a file is enough where it has a projector.

    target      the text model that takes the soft tokens; None for a projector on its own
    backend, arithmetic, threads    as in `load`; those of the target for None
    weights     "stored", or "Q8_0": matrices in F32, F16 or BF16 are rounded to that, which halves them, or quarters

    Raises GGUFError, with one clear line, for a file that cannot be used or does not fit the target; MemoryRefusal; ValueError for other
    arguments.
    """
    if weights not in ("stored", "Q8_0"):
        raise ValueError(f"weights={weights!r}: expected 'stored' or 'Q8_0'")
    functions = _functions(target, backend, arithmetic, threads)
    file = open_projector(local(_beside(target) if path is None else path, "projector"))
    config = projector_config_from_gguf(file)
    if target is not None and config.n_out != target.config.n_embd:
        raise GGUFError(file.path, None, f"soft tokens are {config.n_out} wide, {target.name} takes {target.config.n_embd}: this projector "
                        "belongs to another model")
    warn_of_unknown_keys(file.metadata, file.path)
    found = projector_weights_from_gguf(file, config)
    kernels, preparing = functions.name == "kernels", InMemory(functions.prepare)
    if weights == "Q8_0":
        found = prepare_matrices(found, _rounded)
    elif kernels:
        preparing = preparer(file, products_of(found), functions.prepare, functions.held,
                             cache_disk if target is None else target.cache_disk)
        preparing.fit(lambda mapped: weight_bytes(found, functions.held, found.tables, mapped)[0] + tower_bytes(config), available())
    n_bytes, buffers, have = weight_bytes(found, functions.held, found.tables, preparing.mapped)[0], tower_bytes(config), available()
    if kernels and n_bytes + buffers > have:
        raise MemoryRefusal(f"{file.path}: the projector needs {(n_bytes + buffers) / 1e9:.2f} GB (weights {n_bytes / 1e9:.2f} GB, "
                            f"{buffers / 1e9:.2f} GB to compute a large picture or sound in), this machine has {have / 1e9:.2f} GB free; "
                            "as Q8_0 its weights are half as large (--mmproj-q8)")
    with functions.running(), progress("MB of the projector", file.n_bytes, 10**6) as advance:
        prepared = prepare_matrices(found, with_progress(preparing.prepare, file, advance))
    preparing.finish()
    return Projector(file, config, prepared, functions, preparing, target, weights)


def _rounded(matrix: StoredMatrix) -> StoredMatrix:
    """The same as Q8_0 where a converter to that type would round it."""
    if matrix.type not in FLOATS or type_in_projector("Q8_0", matrix) != "Q8_0":
        return matrix
    return StoredMatrix(matrix.name, "Q8_0", matrix.shape, lambda: Matrix(quantize(matrix.read().float32(), "Q8_0"), "Q8_0"))


def projectors_beside(path: Path | None) -> list[Path]:
    """Projectors in a model's folder: GGUF files with "mmproj" in their names, or the model's own directory if it is one. None: the
    built-in model's.
    """
    if path is None:
        return [BUILT_IN_PROJECTOR]
    return [path] if path.is_dir() else sorted(file for file in path.parent.glob("*.gguf") if "mmproj" in file.name.lower())


def _beside(target: Model | None) -> str:
    return "built-in" if target is None else built_in_with(target.file.path)


def _functions(target: Model | None, backend: str | None, arithmetic: str | None, threads: int | None) -> Backend:
    """The target's, or those that were asked for."""
    if backend is None and arithmetic is None and threads is None and target is not None:
        return target.backend
    backend = backend or (target.backend.name if target else "kernels")
    if backend not in ("kernels", "reference"):
        raise ValueError(f"backend={backend!r}: expected 'kernels' or 'reference'")
    arithmetic = arithmetic or (target.backend.arithmetic if target else {"kernels": "q8", "reference": "exact"}[backend])
    if arithmetic not in ARITHMETIC:
        raise ValueError(f"arithmetic={arithmetic!r}: expected {' or '.join(map(repr, ARITHMETIC))}")
    if backend == "kernels":
        return kernel_backend(arithmetic, prepare(threads if threads is not None or target is None else target.backend.threads))
    if threads not in (None, 1):
        raise ValueError(f"threads={threads!r}: the reference runs on one thread")
    return reference_backend(arithmetic, Matrix.dequantized if arithmetic == "exact" else lambda matrix: matrix)
