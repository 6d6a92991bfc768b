"""The command line: info, check, plan, convert; features, bench, export, precision and calibrate have own files.

A wrong argument or file ends in one line and exit code 2, a check that fails in exit code 1, Ctrl-C in 130.
"""

import dataclasses
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from internvit.cli.bench import bench
from internvit.cli.calibrate import calibrate
from internvit.cli.export import export
from internvit.cli.features import features
from internvit.cli.network import DTYPES, Size
from internvit.cli.precision import precision
from internvit.cost import TASKS
from internvit.names import LAYOUTS

USER_ERRORS = (ValueError, OSError, ImportError, RuntimeError)

out, err = Console(soft_wrap=False), Console(stderr=True)


class Bytes(click.ParamType):
    """A size in memory such as 24GB or 80GiB."""

    name = "SIZE"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", str(value), re.IGNORECASE)
        if match is None:
            self.fail(f"expected a size such as 24GB or 80GiB, got {value!r}", param, ctx)
        power = " KMGT".index(match[2].upper() or " ")
        return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


_SELECTIVE = "selec-\ntive"
_FITS = {"yes": "yes", "no": "no", "with selective checkpointing": _SELECTIVE, "with checkpointing": "block"}
_MODES = {"none": "yes", "selective": _SELECTIVE, "block": "block"}


def gib(n: float) -> str:
    return f"{n / 2**30:.1f}G" if n >= 10 * 2**30 else f"{n / 2**30:.2f}G" if n >= 2**30 else f"{n / 2**20:.0f}M"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="internvit")
def cli() -> None:
    """InternViT: features of images, what this machine can run, what each variant costs.

    \b
    Examples:
      internvit features photos/ --model internvit-300m-448px-v2.5 --out features.safetensors --pca pca.png
      internvit check --quick
      internvit plan --task segmentation --memory 24GB --train
    """


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def info(as_json: bool) -> None:
    """Versions, devices, instruction sets, and which backends run here and why not."""
    from internvit.cli.environment import info as collect

    environment = collect()
    if as_json:
        click.echo(json.dumps(environment, indent=2))
        return
    table = Table("what", "value", title="this machine", title_justify="left")
    for name, version in environment["versions"].items():
        table.add_row(name, version)
    table.add_row("devices", "\n".join(environment["devices"]))
    table.add_row("CPU", f"{environment['cpu']['name']}, {environment['cpu']['threads']} threads")
    table.add_row("instruction sets", " ".join(environment["cpu"]["instruction sets"]))
    out.print(table)
    table = Table("backend", "runs", "otherwise why not, and how to get it", title="backends", title_justify="left")
    for row in environment["backends"]:
        table.add_row(row["backend"], row["available"], escape(row["reason"]))
    out.print(table)
    table = Table("op", "backend chosen", title="auto, bfloat16", title_justify="left")
    for op, name in environment["chosen"].items():
        table.add_row(op, name)
    out.print(table)


@cli.command()
@click.option("--quick", is_flag=True, help="A minute's worth: fewer shapes and data.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--seed", type=int, help="Repeats a run's random data; fresh otherwise.")
@click.option("--precision", type=click.Choice(["int8"]), help="Only whole models with their Linears in this.")
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def check(quick: bool, device: str, seed: int | None, precision: str | None, as_json: bool) -> None:
    """Check every op and backend, and a whole model, against float64 on this machine; exit 1 if anything fails.

    \b
    Example:
      internvit check --quick
    """
    from internvit.cli.selfcheck import checks, run

    total = sum(1 for _ in checks(quick, device, seed, precision))
    results = list(tqdm(run(quick, device, seed, precision), total=total, unit="check", disable=None))
    failed = [r for r in results if not r.passed]
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(r) for r in results], indent=2))
    else:
        table = Table("what", "backend", "dtype", "checks", "worst error", "result", title="numerics contract")
        groups: dict[tuple[str, str, str], list] = {}
        for r in results:
            groups.setdefault((r.what.partition(",")[0], r.backend, r.dtype), []).append(r)
        for (what, backend, dtype), rows in groups.items():
            bad = [r for r in rows if not r.passed]
            verdict = "[green]passed" if not bad else f"[red]{len(bad)} failed"
            table.add_row(what, backend, dtype, str(len(rows)), f"{max(r.error for r in rows):.1e}", verdict)
        out.print(table)
        for r in failed:
            out.print(f"[red]{r.what} on {r.backend}, {r.dtype}, {r.shape}[/]: {escape('; '.join(r.failures))}")
        click.echo(f"{len(results) - len(failed)} passed, {len(failed)} failed")
    if failed:
        raise SystemExit(1)


@cli.command()
@click.option("--task", type=click.Choice(list(TASKS)), default="simple", show_default=True)
@click.option("--size", type=Size(), help="Height and width in pixels; the task's usual size by default.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True)
@click.option("--train", is_flag=True, help="Fine-tune all weights with AdamW.")
@click.option("--memory", type=Bytes(), help="What there is, such as 24GB; of each device.")
@click.option("--devices", type=click.IntRange(1), help="How many: tensor parallel, FSDP and data parallel over them.")
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def plan(
    task: str,
    size: tuple[int, int] | None,
    batch: int,
    dtype: str,
    train: bool,
    memory: int | None,
    devices: int | None,
    as_json: bool,
) -> None:
    """Parameters, FLOPs and memory of every variant; what fits, and which to take.

    With --devices: the layouts over them, bytes a device and bytes sent for an image.

    \b
    Examples:
      internvit plan --task segmentation --batch 2 --train --memory 80GB
      internvit plan --devices 8 --memory 80GB --train --batch 8
    """
    from internvit.cost import plan as make

    if devices is not None:
        if memory is None:
            raise click.UsageError("--devices needs --memory, of each device")
        _plan_devices(task, devices, memory, size, batch, dtype, train, as_json)
        return
    result = make(task, size, batch, DTYPES[dtype], train, memory)
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2))
        return
    use = "training" if train else "inference"
    title = f"{TASKS[task]}\n{use}, {result.costs[0].tokens} tokens, batch {batch}, {dtype}"
    headings = (
        ["weights", "optim-\nizer", "activ-\nations", "selec-\ntive", "block", "total"]
        if train
        else ["weights", "activ-\nations", "total"]
    )
    table = Table("internvit-", title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.columns[0].min_width = 15
    parameters = [] if train else ["para-\nmeters"]  # no room for them in 80 columns
    for heading in [*parameters, "TFLOP/\nimage", *headings, *(["fits"] if result.fits else [])]:
        table.add_column(heading, justify="right", no_wrap=True)
    for c in result.costs:
        activations = [c.training, c.selective, c.checkpointing] if train else [c.inference]
        sizes = [c.weights, *([c.optimizer] if train else []), *activations]
        row = [c.variant.removeprefix("internvit-"), *([] if train else [f"{c.parameters / 1e9:.2f}B"])]
        row += [f"{c.flops / 1e12:.2f}", *map(gib, (*sizes, c.total(train)))]
        table.add_row(*row, *([_FITS[result.fits[c.variant]]] if result.fits else []))
    out.print(table)
    out.print(f"take {result.choice}: {result.why}" if result.choice else result.why, highlight=False)


def _plan_devices(
    task: str,
    devices: int,
    memory: int,
    size: tuple[int, int] | None,
    batch: int,
    dtype: str,
    train: bool,
    as_json: bool,
) -> None:
    from internvit.device_cost import device_plan

    result = device_plan(task, devices, memory, size, batch, DTYPES[dtype], train)
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2))
        return
    images = f"batch {batch} of each group that shares images"
    out.print(f"{devices} devices, {'training' if train else 'inference'}, {dtype}, {images}", highlight=False)
    optional = ["optim-\nizer"] if train else []
    for variant in dict.fromkeys(c.variant for c in result.costs):
        table = Table(variant, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for heading in ["weights", *optional, "activ-\nations", "gath-\nered", "total", "sent/\nimage", "fits"]:
            table.add_column(heading, justify="right", no_wrap=True)
        for c in result.costs:
            if c.variant == variant:
                sizes = [c.weights, *([c.optimizer] if train else []), c.activations, c.gathered, c.total, c.sent]
                table.add_row(c.layout, *map(gib, sizes), _MODES[c.checkpointing] if c.fits else "no")
        out.print(table)
    choice = result.choice
    take = f"take {choice.variant}, {choice.layout}: " if choice else ""
    out.print(take + result.why, highlight=False)


@cli.command()
@click.argument("source")
@click.argument("target", type=click.Path(file_okay=False, path_type=Path))
@click.option("--to", "layout", type=click.Choice(LAYOUTS), required=True, help="Whose names to write.")
@click.option("--prefix", help="Before the tower's names in SOURCE, if it holds several towers.")
@click.option("--overwrite", is_flag=True, help="Replace weights and config.json in TARGET.")
def convert(source: str, target: Path, layout: str, prefix: str | None, overwrite: bool) -> None:
    """Read the checkpoint SOURCE in any layout and write it to the folder TARGET in another.

    \b
    Example:
      internvit convert OpenGVLab/InternViT-300M-448px-V2_5 ./for-transformers --to transformers
    """
    from internvit.model.vit import InternViT

    model = InternViT.from_pretrained(source, prefix=prefix)
    model.save_pretrained(target, layout=layout, overwrite=overwrite)
    click.echo(f"{model.config.num_parameters():,} parameters in {layout}'s layout: {target}")


cli.add_command(features)
cli.add_command(bench)
cli.add_command(export)
cli.add_command(precision)
cli.add_command(calibrate)


def run(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits."""
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=err, show_path=False)]
    )
    try:
        code = cli.main(args=arguments, prog_name="internvit", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except USER_ERRORS as error:
        message = " ".join(str(error).split())
        click.echo(f"internvit: {message.encode('utf-8', 'backslashreplace').decode()}", err=True)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)
