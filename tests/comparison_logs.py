"""Logs of trainings, written by hand, for the tests of what reads them."""

import json


def write_scalars(work_dir, run, *entries):
    path = work_dir / run / "vis_data" / "scalars.json"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def step(epoch, seconds):
    return {"lr": 0.1, "loss": 2.0, "time": seconds, "epoch": epoch, "step": 7 * epoch}
