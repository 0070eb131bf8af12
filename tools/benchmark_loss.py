"""Time the connectors and the loss of MSKD over batch sizes and numbers of regions.

python tools/benchmark_loss.py --plot work_dirs/loss.png

The stage is that of ResNet32x4 to ResNet8x4 unless told otherwise: random maps in, forward and
backward of both connectors and the loss. The batch size varies at scales (1, 2, 4); the scales
vary, from (1) to (1, ..., 8), at the first batch size.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from mskd_plugin.cli import run_tool
from mskd_plugin.connectors import MultiScaleDecouplingConnector
from mskd_plugin.errors import SettingError, check_output
from mskd_plugin.files import write_json
from mskd_plugin.functional.decoupling import DEFAULT_SCALES
from mskd_plugin.launch import Count
from mskd_plugin.losses import MultiScaleContrastiveLoss
from mskd_plugin.measure import by_turns, device_name, markdown_table, peak_memory, quartiles


class Case:
    """Connectors and loss for one batch size and one choice of scales.

    Args:
        batch_size: N.
        scales: Scales of the connectors.
        args: The command line.
    """

    def __init__(self, batch_size: int, scales: tuple[int, ...], args: argparse.Namespace) -> None:
        self.batch_size, self.scales = batch_size, scales
        device = "cuda" if torch.cuda.is_available() else "cpu"
        shape = (batch_size, args.channels, args.side, args.side)
        self.student_map = torch.randn(shape, device=device, requires_grad=True)
        self.teacher_map = torch.randn(shape, device=device)
        self.student = MultiScaleDecouplingConnector(
            scales, projector="linear", in_channels=args.channels, out_channels=args.channels
        ).to(device)
        self.teacher = MultiScaleDecouplingConnector(scales)
        self.loss = MultiScaleContrastiveLoss()

    @property
    def regions(self) -> int:
        """Regions of one image."""
        return sum(scale**2 for scale in self.scales)

    def run(self) -> None:
        """Take one forward and backward pass."""
        self.student_map.grad = None
        self.loss(self.student(self.student_map), self.teacher(self.teacher_map)).backward()


def measure(cases: list[Case], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the cases by turns, and the memory of each."""
    times = by_turns([case.run for case in cases], args.repeats, warmup=1)
    rows = []
    for case, taken in zip(cases, times):
        rows.append(
            {
                "batch size": case.batch_size,
                "scales": list(case.scales),
                "regions": case.regions,
                "ms": 1e3 * statistics.median(taken),
                "ms per image": 1e3 * statistics.median(taken) / case.batch_size,
                "quartiles": quartiles(taken),
                "peak memory (MiB)": peak_memory(case.run),
                "similarities": case.batch_size**2 * case.regions
                + case.batch_size * sum(scale**4 for scale in case.scales if scale > 1),
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Format figures as a Markdown table."""
    columns = {
        "batch size": "{batch size}",
        "regions": "{regions}",
        "ms (quartiles)": "{ms:.2f} ({quartiles[0]:.2f} to {quartiles[1]:.2f})",
        "ms per image": "{ms per image:.4f}",
        "peak MiB": "{peak memory (MiB):.0f}",
        "similarities": "{similarities:,}",
    }
    return markdown_table(columns, rows)


def check_plot(file: Path) -> None:
    """Check that matplotlib can write the file, before what it shows is measured."""
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if file.suffix.lower().removeprefix(".") not in known:
        raise SettingError(
            "--plot", f"a file name that ends with .{', .'.join(known)}", repr(str(file))
        )
    check_output("--plot", file)


def plot(sweeps: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Draw time and memory over what each sweep varies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(sweeps), figsize=(5 * len(sweeps), 3.6))
    for axes, (varied, rows) in zip(panels, sweeps.items()):
        values = [row[varied] for row in rows]
        axes.loglog(values, [row["ms"] for row in rows], "o-", label="time (ms)")
        axes.loglog(values, [row["peak memory (MiB)"] for row in rows], "s--", label="peak (MiB)")
        axes.set_xticks(values, [str(value) for value in values])
        axes.minorticks_off()
        axes.set_xlabel(varied)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(device_name(), fontsize=9)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Time the connectors and the loss of MSKD over batch sizes and numbers of "
        "regions.",
        epilog="example: python tools/benchmark_loss.py --plot work_dirs/loss.png",
    )
    parser.add_argument(
        "--batch-sizes",
        action=Count,
        nargs="+",
        default=[64, 128, 256, 512, 1024, 2048],
        metavar="N",
    )
    parser.add_argument(
        "--max-scale", action=Count, default=8, help="scales up to (1, ..., MAX_SCALE) (default: 8)"
    )
    parser.add_argument("--channels", action=Count, default=256, help="of both maps (default: 256)")
    parser.add_argument(
        "--side",
        action=Count,
        least=max(DEFAULT_SCALES),
        default=8,
        help="of both maps (default: 8)",
    )
    parser.add_argument(  # at least two, to tell the spread
        "--repeats", action=Count, least=2, default=5, help="timed passes (default: 5)"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--plot", type=Path, help="also draw them into this file")
    args = parser.parse_args(argv)
    if args.max_scale > args.side:
        raise SettingError("--max-scale", f"from 1 to the side {args.side}", args.max_scale)
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse_args(argv)
    if args.json:
        check_output("--json", args.json)
    if args.plot:
        check_plot(args.plot)
    torch.manual_seed(0)
    scales = [tuple(range(1, top + 1)) for top in range(1, args.max_scale + 1)]
    cases = {
        "batch size": [Case(size, DEFAULT_SCALES, args) for size in args.batch_sizes],
        "regions": [Case(args.batch_sizes[0], some, args) for some in scales],
    }
    sweeps = {varied: measure(some, args) for varied, some in cases.items()}
    print(f"{device_name()}, maps of {args.channels} channels at {args.side} x {args.side}")
    for rows in sweeps.values():
        print(f"\n{markdown(rows)}")
    if args.json:
        write_json(sweeps, args.json)
    if args.plot:
        plot(sweeps, args.plot)


if __name__ == "__main__":
    run_tool(main)
