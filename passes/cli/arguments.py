"""What the commands take: their arguments and options, with the help that is printed for them. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SOURCES = "a TorchScript file (.pt), package.module:callable, torchvision:NAME, or timm:NAME"
INPUTS_HELP = (
    "An example input, once per tensor argument: 1x3x224x224 (random floats), 8x128:bfloat16 (another dtype), "
    "1x128:int64 (random integers from 0 to 99), 1x128:int64:30522 (from 0 to 30521), scalar:int64 (rank 0)."
)
CHOICES_HELP = (
    "A file of measured choices, which ops oneDNN's kernels fuse: it is replayed if it exists, which gives the same graph "
    "again, and written otherwise."
)
CALIBRATION_HELP = (
    "Calls on which passes that lower precision observe how large values get, in place of the random --input: a file that "
    "torch.save wrote of a list, each call a tensor, a tuple or list of arguments, or a dict of keyword arguments. "
    "Nothing else is unpickled."
)
SOURCE_HELP = f"The model: {SOURCES}."


Source = Annotated[str, typer.Argument(help=SOURCE_HELP)]
Inputs = Annotated[list[str] | None, typer.Option("--input", "-i", help=INPUTS_HELP, metavar="SHAPE[:DTYPE[:BELOW]]")]
PassNames = Annotated[
    str | None,
    typer.Option(
        "--passes",
        "-p",
        help="Passes and groups, comma-separated, with options after colons: fuse_conv_bn_relu,cast_half:level=O1. An option "
        "of several names joins them by +: keep_float=head+softmax, overrides=head=O1+encoder=float. Default: the pipeline "
        "that changes no precision. `torch-passes passes` lists passes, options and what these may be.",
        metavar="NAME[:OPTION=VALUE]…,…",
    ),
]
Frontend = Annotated[str, typer.Option(help="How to capture: auto, export, trace, script or fx.")]
Calibration = Annotated[Path | None, typer.Option(help=CALIBRATION_HELP, metavar="FILE")]
Engine = Annotated[str, typer.Option(help="What to emit: auto, aten or onednn_ops.")]
