"""Models from a Hugging Face hub: `hf:owner/name[@revision][:type or file]` wherever a path to a model is taken.

    hf:google/gemma-4-E4B-it-qat-q4_0-gguf          the repository's GGUF file
    hf:unsloth/gemma-4-E4B-it-GGUF:Q4_K_M           of several, the one of this type (as llama.cpp's -hf: in any case)
    hf:unsloth/gemma-4-E4B-it-GGUF:MTP/x.gguf       this file; a split one comes with all its parts
    hf:google/gemma-4-E4B-it-assistant@main         a repository without GGUF: the folder with config.json and safetensors

With several GGUF files and no type: Q4_0 where the repository's name says qat, else Q4_K_M, and a refusal that lists them where that does
not leave exactly one. Drafters and image parts (mmproj, mtp, assistant, imatrix in the name) do not count, unless one is asked for or there
is nothing else; of several projectors the BF16 one is taken, then F16. A local file whose name starts with hf: is ./hf:name.

`built-in` and `built-in:e2b` are the models that ship (tiny/README.md); for a drafter and a projector, those that ship with them.

Files are in huggingface_hub's own cache, shared with other programs, and its environment variables apply (HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE, HF_ENDPOINT). It resumes a download that breaks off while it runs (a stopped one starts again), and compares sizes. Whether
the bytes are those that the repository lists is checked here, by SHA-256, once for each file.
"""

import contextlib
import errno
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from refimpl.formats.gguf import GGUFError
from refimpl.formats.hashing import file_hash
from refimpl.loading.hub_files import HubError, chosen

PREFIX = "hf:"
SPEC = re.compile(r"hf:(?P<repo>[^/:@]+/[^/:@]+)(?:@(?P<revision>[^:]+))?(?::(?P<what>.+))?")
ADDRESS = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[^/?#]+/[^/?#]+)"
                     r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/?#]+)(?:/(?P<file>[^?#]+\.gguf))?)?")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(?:@[^:/]+)?(?::[^/]+)?")            # owner/name[@revision][:type or file]
SHA256 = re.compile("[0-9a-f]{64}")
TINY = Path(__file__).parent.parent / "tiny"
BUILT_IN_FOLDERS = {"built-in": TINY, "built-in:e2b": TINY / "e2b"}
BUILT_IN_NAMES = {"model": "model.gguf", "drafter": "drafter.gguf", "projector": "mmproj.gguf"}
TIMEOUT = 20                            # seconds until a server that does not answer counts as out of reach


@dataclass(frozen=True)
class _File:
    """A file of a repository, as the hub lists it. Of one that is only in the cache, nothing but the name is known."""

    name: str
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class _Listing:
    """The files of one revision; `folder`: where they are in the cache, if the hub could not be asked."""

    repo: str
    revision: str
    files: dict[str, _File]
    folder: Path | None = None


def is_remote(path: str | os.PathLike) -> bool:
    """Whether this names a model on the hub."""
    return os.fspath(path).startswith(PREFIX)


def local(path: str | os.PathLike, role: str = "model") -> Path:
    """The file or folder that `path` names, downloaded first if it starts with `hf:`. For a "drafter", files named like one come first; a
    "projector" must be named like one.

    Raises HubError if it cannot be downloaded; nothing incomplete or wrong stays in the cache. Raises GGUFError for a path that does not
    exist and looks like a repository or its address, or a built-in model that there is not.
    """
    if not os.fspath(path):
        raise GGUFError("the model", None, "its name is empty")
    if os.fspath(path).partition(":")[0] == "built-in":
        return _built_in(os.fspath(path), role)
    if not is_remote(path):
        if meant := near_miss(path):
            raise GGUFError(path, None, f"no such file; did you mean {meant}?")
        return Path(path)
    spec = os.fspath(path)
    asked = SPEC.fullmatch(spec)
    if asked is None:
        raise HubError(f"{spec}: expected hf:owner/name, hf:owner/name:type or hf:owner/name:file.gguf, with @revision after the name")
    listing = _list(spec, asked["repo"], asked["revision"] or "main")
    names = chosen(spec, list(listing.files), asked["what"], role, "the repository" if listing.folder is None else "the cache")
    _refuse_a_full_disk(spec, listing, names)
    paths = [_fetch(spec, listing, listing.files[name]) for name in names]
    return paths[0] if names[0].lower().endswith(".gguf") else paths[names.index("config.json")].parent


def _built_in(name: str, role: str) -> Path:
    if name not in BUILT_IN_FOLDERS:
        raise GGUFError(name, None, f"no such model; there is {' and '.join(BUILT_IN_FOLDERS)}")
    file = BUILT_IN_FOLDERS[name] / BUILT_IN_NAMES[role]
    if role != "model" and not file.exists():
        raise GGUFError(name, None, f"this model has no {role}")
    return file


def built_in_with(model: Path) -> str:
    """The name of the built-in model whose file this is; "built-in" for any other file."""
    return next((name for name, folder in BUILT_IN_FOLDERS.items() if folder == model.resolve().parent), "built-in")


def is_built_in(model: Path) -> bool:
    """Whether this is the file of a model that ships."""
    return model.resolve().parent in BUILT_IN_FOLDERS.values()


def projector_of(spec: str) -> Path:
    """The projector in the repository of a model `hf:...`, downloaded; the repository itself where it has no GGUF. Raises as `local`."""
    asked = SPEC.fullmatch(spec)
    revision = f"@{asked['revision']}" if asked["revision"] else ""
    return local(f"{PREFIX}{asked['repo']}{revision}", "projector")


def near_miss(path: str | os.PathLike) -> str | None:
    """The `hf:` name that was probably meant by a path that is none: `owner/name`, or an address on huggingface.co."""
    text = os.fspath(path)
    if found := ADDRESS.match(text):
        revision = "" if found["revision"] in (None, "main") else f"@{found['revision']}"
        return f"{PREFIX}{found['repo']}{revision}" + (f":{found['file']}" if found["file"] else "")
    owner = text.split("/")[0]
    looks_local = owner in (".", "..", "~") or os.path.exists(owner) or text.lower().endswith((".gguf", ".json", ".safetensors"))
    return f"{PREFIX}{text}" if REPOSITORY.fullmatch(text) and not looks_local and not os.path.exists(text) else None


def listed_sha256(path: Path) -> str | None:
    """The SHA-256 that the hub lists for a file in its cache, which keeps large files under that name; None for any other file."""
    blob = Path(os.path.realpath(path))
    return blob.name if blob.parent.name == "blobs" and SHA256.fullmatch(blob.name) else None


# What the hub has, and what the cache has ----------------------------------------------------------------------------------


def _list(spec: str, repo: str, revision: str) -> _Listing:
    from huggingface_hub import HfApi

    try:
        with _quiet():
            info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
            files = [_File(s.rfilename, s.size, s.lfs["sha256"] if s.lfs else None) for s in info.siblings or ()]
    except Exception as error:                                  # of any of three HTTP libraries, by huggingface_hub's version
        cached = _cached(repo, revision) if _out_of_reach(error) else None
        if cached is None:
            raise HubError(f"{spec}: {_reason(error)}") from error
        if not _offline(error):
            warnings.warn(f"{spec}: {_reason(error)}; what was downloaded before is used", stacklevel=3)
        return cached
    return _Listing(repo, revision, {file.name: file for file in files})


def _cached(repo: str, revision: str) -> _Listing | None:
    """The files of a revision that are in the cache; None where there are none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):
        return None
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return _Listing(repo, revision, {name: _File(name) for name in names}, folder) if names else None


def _refuse_a_full_disk(spec: str, listing: _Listing, names: list[str]):
    """Before a download of gigabytes, not after it. Files that an older revision has too are in the folder of blobs."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    blobs = cache / f"models--{listing.repo.replace('/', '--')}" / "blobs"
    need = sum(f.size or 0 for f in map(listing.files.get, names) if f.sha256 is None or not (blobs / f.sha256).exists())
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    if need > (free := shutil.disk_usage(there).free):
        raise HubError(f"{spec}: needs {need / 1e9:.2f} GB in {cache}, {free / 1e9:.2f} GB are free; HF_HOME=FOLDER puts it elsewhere")


def _fetch(spec: str, listing: _Listing, file: _File) -> Path:
    """One file, in the cache and checked."""
    from huggingface_hub import hf_hub_download

    if listing.folder is not None:
        path = listing.folder / file.name
    else:
        try:
            with _quiet():
                path = Path(hf_hub_download(listing.repo, file.name, revision=listing.revision))
        except Exception as error:
            raise HubError(f"{spec}: {file.name}: {_reason(error)}") from error
    _check(spec, file, path)
    return path


def _check(spec: str, file: _File, path: Path):
    """Compares the SHA-256 once, and notes in the repository's folder that it was right, with size and time. Deletes a wrong file."""
    blob, wanted = Path(os.path.realpath(path)), file.sha256 or listed_sha256(path)
    if wanted is None:                                          # a small file, which git keeps itself
        return
    mark = path.parents[file.name.count("/") + 2] / ".verified" / wanted
    seen = f"{blob.stat().st_size} {blob.stat().st_mtime_ns}"
    with contextlib.suppress(OSError):
        if mark.read_text() == seen:
            return
    if _sha256(blob, file.name) != wanted:
        for file_or_link in (path, blob):
            file_or_link.unlink(missing_ok=True)
        raise HubError(f"{spec}: {file.name}: its SHA-256 is not the one that the repository lists, so it was deleted; try again")
    with contextlib.suppress(OSError):                          # a cache that cannot be written to: checked again next time
        mark.parent.mkdir(exist_ok=True)
        mark.write_text(seen)


def _sha256(path: Path, name: str) -> str:
    """With a bar, as for the download."""
    from huggingface_hub.utils import tqdm

    with tqdm(total=path.stat().st_size, desc=f"checking {name}", unit="B", unit_scale=True, disable=None, leave=False) as progress:
        return file_hash(path, progress.update)


# What went wrong -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without huggingface_hub's log lines: an error becomes one line of ours, and bars are shown on a terminal only."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _offline(error: BaseException) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    return isinstance(error, OfflineModeIsEnabled)


def _out_of_reach(error: BaseException) -> bool:
    """No answer, or one that only reports the hub's own troubles."""
    status = _status(error)
    libraries = ("httpx", "httpx2", "requests", "urllib3")
    return status >= 500 if status is not None else isinstance(error, ConnectionError) or any(
        kind.__module__.split(".")[0] in libraries for kind in type(error).__mro__)


def _reason(error: BaseException) -> str:
    """What went wrong and what helps, on one line."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    status, host = _status(error), constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return f"its owners want their terms accepted first: do so on their page at {host}, then set HF_TOKEN to a token of yours"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{host} has no such repository, or a private one, for which HF_TOKEN must be set"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        return "the repository has no such file any more; try again"
    if status in (401, 403):
        return f"{host} refuses the token in HF_TOKEN (status {status})" if status == 401 else f"{host} does not allow it (status 403)"
    if status is not None:
        return f"{host} answered with status {status}; try again later"
    if _offline(error):
        return "not in the cache, and HF_HUB_OFFLINE forbids to download it"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no room left on the disk of {constants.HF_HUB_CACHE}; HF_HOME=FOLDER puts the cache elsewhere"
    if _out_of_reach(error):
        return f"no connection to {host}, or it broke off again and again ({_first_line(error)}); try again"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if "onsistency check" in str(error):
        return "the server sent another number of bytes than it lists, and they were not kept; try again"
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).split("\n")), "") or type(error).__name__
