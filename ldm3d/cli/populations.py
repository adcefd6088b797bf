"""Commands for groups of people instead of single scans: atlas, augment."""

from pathlib import Path
from typing import Annotated

import typer

from ldm3d.cli.generation import often, requested, run_series
from ldm3d.cli.options import (
    Audit,
    BatchSize,
    Device,
    Guidance,
    ModelPath,
    Precision,
    SamplerName,
    Seed,
    SeriesFolder,
    Spread,
    Steps,
    Threads,
    app,
    load_model,
)
from ldm3d.errors import InputError


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def atlas(
    context: typer.Context,
    model: ModelPath,
    out: SeriesFolder,
    by: Annotated[str, typer.Option(metavar="NAME,...", help="Categories, each of which gets its own cells: sex.")] = "",
    volumes: Annotated[int, typer.Option(min=2, help="Drawn for each cell.")] = 100,
    rounds: Annotated[int, typer.Option(min=0, help="Of registration for the sharp template; 0: none.")] = 2,
    name: Annotated[str, typer.Option(help="Of the template, letters and digits: tpl-NAME.")] = "synthetic",
    ask: Annotated[list[str], typer.Option(metavar="NAME=VALUE", help="A covariate whose name is an option.")] = [],  # noqa: B006 (typer reads it, and it is never changed)
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: SamplerName = None,
    spread: Spread = None,
    batch_size: BatchSize = 8,
    threads: Threads = 1,
    device: Device = None,
    precision: Precision = "auto",
) -> None:
    """Templates of synthetic brains for each age and group, and a film over age, as a BIDS template derivative.

    Ask for covariates by name, one of them as FIRST:LAST:STEP: --age 20:90:10 --by sex. Run again, the same command continues
    where it was stopped.
    """
    from tqdm import tqdm

    from ldm3d.applications.atlas_files import ATLAS
    from ldm3d.applications.atlas_files import atlas as apply
    from ldm3d.preemption import REQUEUE, preemption
    from ldm3d.report.derived import write_derived

    if not name.isascii() or not name.isalnum():
        raise InputError(f"--name {name!r}: a template's name has letters and digits only")
    pipe, sampling = load_model(model, device, precision, seed, steps, guidance, sampler)
    sampling = sampling.replace(spread=spread)
    pipe.threads = threads
    groups = [each.strip() for each in by.split(",") if each.strip()]
    with preemption() as stop, tqdm(desc="atlas", unit="volume", mininterval=often(), delay=1e-3) as bar:

        def show(cell: str, done: int, total: int) -> None:
            bar.set_description(cell, refresh=False)
            bar.total = total
            bar.update(done - bar.n)

        options = {"name": name, "rounds": rounds, "sampling": sampling, "batch_size": batch_size}
        done = apply(pipe, out, requested(context.args, ask), groups, volumes, progress=show, stop=stop, **options)
    if not done:
        print(f"stopped by {stop.signal}: run the same command to continue from there", flush=True)
        raise SystemExit(REQUEUE)
    page = write_derived(out, ATLAS)
    print(f"templates of synthetic volumes written to {out}; measured volumes: {out / 'cohorts.tsv'}; page: {page}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def augment(
    context: typer.Context,
    model: ModelPath,
    out: SeriesFolder,
    table: Annotated[Path, typer.Option(help="CSV or TSV of people, a row each, with columns of covariates.")],
    by: Annotated[str, typer.Option(metavar="NAME,...", help="Covariates whose groups are filled: age,sex.")],
    per_group: Annotated[int, typer.Option(min=1, help="People that each group is to have, real and generated.")] = 200,
    bins: Annotated[int, typer.Option(min=1, help="Of each number, of equal width.")] = 5,
    ask: Annotated[list[str], typer.Option(metavar="NAME=VALUE", help="Asked of all volumes, too.")] = [],  # noqa: B006
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: SamplerName = None,
    spread: Spread = None,
    batch_size: BatchSize = 8,
    threads: Threads = 1,
    audit: Audit = None,
    device: Device = None,
    precision: Precision = "auto",
) -> None:
    """Fill thin groups of a table with generated volumes: a dataset in OUT/volumes, and tables beside it.

    Give the people of your training alone: who is tested on must not be counted. What all volumes are to have is asked by
    name: --source real. Run again, the same command continues where it was stopped.
    """
    from ldm3d.applications.augment import groups_of, tables_of
    from ldm3d.data.tables import read_table, write_table
    from ldm3d.privacy.guard import Guard
    from ldm3d.processes import Processes
    from ldm3d.report.derived import write_augmented

    pipe, sampling = load_model(model, device, precision, seed, steps, guidance, sampler)
    sampling = sampling.replace(spread=spread)
    pipe.threads = threads
    rows = read_table(table).to_dict("records")
    names = [each.strip() for each in by.split(",") if each.strip()]
    groups = groups_of(pipe.schema, rows, names, per_group, requested(context.args, ask), bins, sampling.seed)
    requests = pipe.parse([request for group in groups for request in group.requests])
    if not requests:
        print(f"every group of {table} has {per_group} people or more; nothing is generated")
        return
    thin = sum(bool(group.requests) for group in groups)
    print(f"{len(requests)} volumes for {thin} of {len(groups)} groups that have fewer than {per_group} people", flush=True)
    guard = Guard.load(audit, pipe.model_hash) if audit else None
    if run_series(pipe, sampling, requests, out / "volumes", batch_size, True, guard, Processes()):
        for name, frame in tables_of(groups, rows, out / "volumes", pipe.schema.names, table.parent, pipe.suffix).items():
            write_table(out / name, frame)
        page = write_augmented(out)
        print(f"real and generated people together: {out / 'augmented.tsv'}; how many of each: {out / 'groups.tsv'}, {page}")
