"""`internvit export`: a model in a file for another runtime."""

from pathlib import Path
from typing import Any

import click

from internvit.cli.network import DTYPES, Layers, Size, load_network


class SizeOrDynamic(Size):
    """N, HxW or "dynamic"."""

    name = "N|HxW|dynamic"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return "dynamic" if value == "dynamic" else super().convert(value, param, ctx)


class Batch(click.ParamType):
    """A number of images, or "dynamic"."""

    name = "N|dynamic"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return "dynamic" if value == "dynamic" else click.IntRange(1).convert(value, param, ctx)


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--to", type=click.Choice(["onnx", "openvino", "aoti", "pt2"]), required=True, help="The runtime.")
@click.option("--with-connector", is_flag=True, help="InternVL's connector too: the file returns image tokens.")
@click.option("--layers", type=Layers(), help="Feature maps of these blocks, instead of the last hidden state.")
@click.option("--size", type=SizeOrDynamic(), help="Height and width in pixels, or dynamic; native by default.")
@click.option("--batch", type=Batch(), default="dynamic", show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@click.option("--opset", type=click.IntRange(18), help="Of ONNX; 18 by default.")
@click.option("--precision", type=click.Choice(["int8"]), help="Linears in int8; ONNX from float32.")
@click.option("--backend", type=click.Choice(["cpu", "cuda"]), help="Keep this library's kernels; AOTInductor.")
@click.option("--image", "images", multiple=True, help="A photograph to compare on; may be given again.")
@click.option("--prefix", help="Before the tower's names in MODEL, if it holds several towers.")
@click.option("--overwrite", is_flag=True, help="Replace OUT and the files beside it.")
def export(
    model: str,
    out: Path,
    to: str,
    with_connector: bool,
    layers: tuple[int, ...] | None,
    size: Any,
    batch: Any,
    dtype: str,
    opset: int | None,
    precision: str | None,
    backend: str | None,
    images: tuple[str, ...],
    prefix: str | None,
    overwrite: bool,
) -> None:
    """Write MODEL, a published variant or a checkpoint, to the file OUT for another runtime.

    The file is run in its runtime and compared with PyTorch; it is not written where they differ.

    \b
    Example:
      internvit export ./checkpoint model.onnx --to onnx --size dynamic --image photo.jpg
    """
    from internvit.config import VARIANTS
    from internvit.export import export_model
    from internvit.multimodal.connector import InternVLConnector

    name, weights = (model, None) if model in VARIANTS else (None, model)
    device = "cuda" if backend == "cuda" else "cpu"
    network, source = load_network(name, weights, prefix, dtype, device)
    connector = None
    if with_connector:
        connector = InternVLConnector.from_pretrained(source).to(device, DTYPES[dtype]).eval()
    result = export_model(
        network,
        out,
        to,
        layers=layers,
        connector=connector,
        size=size,
        batch=batch,
        opset=opset,
        precision=precision,
        backend=backend,
        images=images,
        overwrite=overwrite,
    )
    for (rows, columns), error in result.errors.items():
        click.echo(f"{to} and PyTorch differ by {error:.1e} at {rows}x{columns}")
    click.echo(f"{', '.join(result.outputs)}: {', '.join(str(path) for path in result.paths)}")
