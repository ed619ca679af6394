"""cache."""

import json
from typing import Annotated

import typer

from refimpl.cli.app import Json, app, write


@app.command()
def cache(
    clear: Annotated[str | None, typer.Option("--clear", show_default=False, metavar="WHAT", help="delete: old (compiled kernels of other "
                                              "versions, rearranged weights of files that changed or are gone), kernels, weights or read "
                                              "(all; made again when needed), or a listed model (owner/name, with --force)")] = None,
    force: Annotated[bool, typer.Option("--force", help="with --clear owner/name: really delete the downloaded model")] = False,
    as_json: Json = False,
):
    """Show or clear what refimpl keeps on disk to be quick."""
    from refimpl.cli.show.table import size, table
    from refimpl.decode import snapshots
    from refimpl.kernels.machine import cache_folder
    from refimpl.loading import tile_folders

    kernels, weights, models = cache_folder.kernel_folders(), tile_folders.tile_folders(), downloaded()
    read, removed = snapshots.folders(cache_folder.cache_root()), []
    if clear in ("old", "kernels", "weights"):
        old_kernels = [] if clear == "weights" else [folder for folder in kernels if clear == "kernels" or not folder.in_use]
        old_weights = [] if clear == "kernels" else [folder for folder in weights if clear == "weights" or not folder.current]
        cache_folder.remove(folder.path for folder in old_kernels)
        tile_folders.remove(folder.path for folder in old_weights)
        removed = [(str(folder.path), folder.n_bytes) for folder in (*old_kernels, *old_weights)]
    elif clear == "read":
        removed = [(str(folder.path), folder.n_bytes) for folder in read]
        snapshots.remove(folder.path for folder in read)
    elif clear is not None:
        wanted = clear.removeprefix("hf:")
        found = [repo for repo in models if repo.repo_id == wanted]
        if not found:
            raise typer.BadParameter(f"--clear {clear}: expected old, kernels, weights, read, or a downloaded model (owner/name)")
        if not force:
            raise typer.BadParameter(f"--clear {clear}: deletes {size(found[0].size_on_disk)} that other programs may share; "
                                     "--force confirms it")
        from huggingface_hub import scan_cache_dir

        scan_cache_dir().delete_revisions(*(revision.commit_hash for revision in found[0].revisions)).execute()
        removed = [(str(found[0].repo_path), found[0].size_on_disk)]
    if clear is not None:
        total = sum(n_bytes for _, n_bytes in removed)
        write(json.dumps({"removed": [path for path, _ in removed], "bytes": total}) + "\n" if as_json else
              "".join(f"removed {path}\n" for path, _ in removed) + f"{size(total)} freed\n")
    elif as_json:
        write(json.dumps({"kernels": [{"path": str(f.path), "bytes": f.n_bytes, "in_use": f.in_use} for f in kernels],
                          "weights": [{"path": str(f.path), "bytes": f.n_bytes, "files": f.files, "current": f.current}
                                      for f in weights],
                          "read": [{"path": str(f.path), "bytes": f.n_bytes, "model": f.model} for f in read],
                          "models": [{"name": repo.repo_id, "path": str(repo.repo_path), "bytes": repo.size_on_disk} for repo in models]})
              + "\n")
    else:
        rows = [("kernels, in use" if f.in_use else "kernels, of another version", size(f.n_bytes), f.path) for f in kernels]
        rows += [(f"rearranged weights of {f.name or 'an unknown model'}" + ("" if f.current else ", which changed or is gone"),
                  size(f.n_bytes), f.path) for f in weights]
        rows += [(f"what {f.model or 'an unknown model'} has read", size(f.n_bytes), f.path) for f in read]
        rows += [(f"model hf:{repo.repo_id}", size(repo.size_on_disk), repo.repo_path) for repo in models]
        nothing = f"nothing (compiled kernels and rearranged weights go to {cache_folder.cache_root()})"
        write((table(("what", "size", "where"), rows, left=(0, 2)) if rows else nothing) + "\n")


def downloaded() -> list:
    """The models in huggingface_hub's cache, which other programs share, largest first."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return sorted((repo for repo in scan_cache_dir().repos if repo.repo_type == "model"), key=lambda repo: -repo.size_on_disk)
    except (CacheNotFound, OSError):
        return []
