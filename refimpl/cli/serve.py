"""serve."""

from typing import Annotated

import typer

from refimpl.cli.app import (
    Arithmetic,
    CacheDisk,
    Context,
    Draft,
    DraftHead,
    DraftMax,
    Failure,
    Lock,
    ModelPath,
    Positional,
    Threads,
    Verbose,
    app,
    drafting_of,
    errors,
    fetched,
    load,
    n_bytes,
    named,
)
from refimpl.cli.chat import CacheDir, CacheRead, folder_of
from refimpl.cli.senses import Mmproj, MmprojQ8, projector_of, refuse_useless_q8

CONTEXT = 32768         # tokens; the models' own, 131,072 and more, would promise memory that few have

ServedRam = Annotated[str | None, typer.Option("--cache-ram", metavar="SIZE", show_default=False, help="memory for the keys and values of "
                                               "all that is running or remembered: 2G, 500M (default: half of what is free)")]


@app.command()
def serve(
    positional: Positional = None,
    model: ModelPath = None,
    host: Annotated[str, typer.Option("--host", help="address to listen on; 0.0.0.0: all of this machine's")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free")] = 8080,
    api_key: Annotated[str | None, typer.Option("--api-key", envvar="REFIMPL_API_KEY", show_default=False,
                                                help="clients have to know it")] = None,
    cors: Annotated[list[str], typer.Option("--cors", metavar="ORIGIN", show_default=False, help="web pages from there may use the server "
                                            "(may be repeated; *: all)")] = [],          # noqa: B006
    allowed_host: Annotated[list[str], typer.Option("--allowed-host", metavar="NAME", show_default=False, help="a name under which the "
                                                    "server is reached, besides localhost and addresses (may be repeated)")] = [],  # noqa: B006
    parallel: Annotated[int, typer.Option("--parallel", "-np", min=1, max=256, help="answers at a time; more wait")] = 8,
    queue: Annotated[int, typer.Option("--queue", min=1, help="requests that may wait; more get 503")] = 64,
    latency_ms: Annotated[int, typer.Option("--latency-ms", min=1, help="while others write, so much of a new prompt is read at a time "
                                            "that they wait no longer than this")] = 200,
    mmproj: Mmproj = None, mmproj_q8: MmprojQ8 = False,
    ctx: Context = None, draft: Draft = None, draft_max: DraftMax = "auto", draft_head: DraftHead = None,
    threads: Threads = None, arithmetic: Arithmetic = None,
    cache_disk: CacheDisk = "50G", cache_ram: ServedRam = None, cache_dir: CacheDir = None, cache_read: CacheRead = "10G",
    lock: Lock = False, verbose: Verbose = False,
):
    """Serve OpenAI's and Anthropic's APIs, and a page.

    Editors, agents and scripts connect to http://127.0.0.1:8080/v1; a browser opens http://127.0.0.1:8080. Every answer has the bits that
    it has alone, whoever else is asking. Without -m it is the built-in model. Ctrl-C ends it.
    """
    from refimpl.cli.chosen import chosen, context
    from refimpl.cli.show.table import size
    from refimpl.decode.prefixes import Prefixes
    from refimpl.decode.snapshots import Snapshots
    from refimpl.host import available
    from refimpl.loading.memory import longest_context
    from refimpl.loading.model import CHUNK
    from refimpl.serve.app import make_app
    from refimpl.serve.connections import listen, run
    from refimpl.serve.engine import Engine
    from refimpl.serve.scheduler import Scheduler
    from refimpl.serve.settings import Settings

    ram, limit = None if cache_ram is None else n_bytes(cache_ram), n_bytes(cache_read)
    folder = folder_of(cache_dir, limit)
    asked = named(model, positional)
    refuse_useless_q8(mmproj_q8, mmproj, asked, needed=False)
    path = fetched(model, positional)
    m = load(path, "kernels", arithmetic, threads, 4096 if ctx is None else ctx, verbose, cache_disk, lock)
    drafting = drafting_of(m, path, draft, draft_max, 0.0, draft_head)
    projector = projector_of(m, path, asked, mmproj, needed=False, q8=mmproj_q8)
    budget = available() // 2 if ram is None else ram
    n_ctx, reason = min(m.config.n_ctx, ctx or CONTEXT), "longer ones take more memory: -c"
    if ctx is None and ram is None and 0 < (fitting := longest_context(m.config, budget, m.backend.kv_type, CHUNK)) < n_ctx:
        n_ctx, reason = fitting, "keys and values of more do not fit"
    snapshots = None if folder is None else Snapshots(folder, m, limit, lambda note: errors.print(f"note: {note}"))
    prefixes = Prefixes(m, budget, snapshots)
    scheduler = Scheduler(m, prefixes, n_ctx, drafter=drafting.get("drafter"), draft_max=drafting["draft_max"], most_running=parallel,
                          most_waiting=queue, latency=latency_ms / 1000)
    settings = Settings(host=host, port=port, name=m.name, api_key=api_key or None, cors=cors, allowed_hosts=allowed_host)
    if host not in ("127.0.0.1", "localhost", "::1") and not api_key:
        errors.print("note: everybody who reaches this machine can use the server; --api-key asks them for a key")
    try:
        listening = listen(settings)
    except OSError as error:
        why = str(error.strerror or error).partition(" (")[0]          # Python adds the address
        raise Failure(f"cannot listen on {host}:{port}: {why}; another --port or --host may be free") from None
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    half = "half of what is free: --cache-ram" if ram is None else "as given"
    errors.print(chosen(m, threads, context(n_ctx, m.config.n_ctx, ctx, reason), f"{parallel} answers at a time (-np)",
                        f"{size(budget)} for what is read ({half})"))
    errors.print(f"{m.name}: {address} (in a browser: the page; Anthropic), {address}/v1 (OpenAI); Ctrl-C ends")
    engine = Engine(scheduler, projector)
    try:
        run(make_app(engine, settings), settings, listening)
    except KeyboardInterrupt:
        errors.print("stopped")
    finally:
        listening.close()
        engine.close()
