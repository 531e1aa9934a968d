"""FLOPs and speed, metrics lines over resumed runs, and the chip table."""

import io
import json
import math
import re
import sys

import numpy as np
import pytest

from igpt_jax.config import MODELS
from igpt_jax.metrics.logging import Metrics, load_metrics, say
from igpt_jax.metrics.throughput import Throughput
from igpt_jax.model.flops import train_flops_per_image
from igpt_jax.parallel import topology


@pytest.mark.parametrize("name, tokens, teraflops", [
    ("igpt_s", 1024, 0.543), ("igpt_m", 1024, 3.02), ("igpt_l", 1024, 8.82), ("igpt_l", 2304, 21.1),
    ("igpt_xl", 4096, 186),
])
def test_train_flops(name, tokens, teraflops):
    """Figures for the paper's models, computed by hand. Seen to fail with full instead of causal attention."""
    layers, embed, _ = MODELS[name]
    flops = train_flops_per_image(layers, embed, 4 * embed, 512, tokens)
    assert flops / 1e12 == pytest.approx(teraflops, rel=3e-3)


def test_throughput_excludes_compilation_and_pauses():
    """Seen to fail when the first step is counted, and when `paused` does nothing."""
    now = [0.0]
    throughput = Throughput(batch_size=8, tokens=64, flops_per_image=1e12, devices=2, peak_flops=8e12,
                                      clock=lambda: now[0])
    now[0] += 100  # compilation
    throughput.step()
    assert throughput.read() == {} == throughput.overall()
    for _ in range(4):
        now[0] += 2
        throughput.step()
    with throughput.paused():
        now[0] += 50
    rates = throughput.read()
    assert rates == {"images_per_second": 4, "tokens_per_second": 256, "model_tflops_per_second_per_device": 2,
                     "mfu": 0.25}
    now[0] += 4
    throughput.step()
    assert throughput.read()["images_per_second"] == 2
    assert throughput.overall()["images_per_second"] == pytest.approx(40 / 12)


def run(workdir, start, stop):
    metrics = Metrics(workdir, total_steps=10, start_step=start)
    for step in range(start + 1, stop + 1):
        metrics.log(step, {"train/nats_per_pixel": 1 / step})
    metrics.close()


def test_a_resumed_run_writes_each_line_once(tmp_path, capsys):
    """A run reaches step 5 and resumes from step 3. Seen to fail with the lines of steps 4 and 5 kept."""
    run(tmp_path, 0, 5)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "ti')  # the last line of a killed run
    run(tmp_path, 3, 7)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert all(line["time"] > 1.7e9 for line in lines)
    assert load_metrics(tmp_path) == lines
    run(tmp_path, 0, 2)
    assert [line["step"] for line in load_metrics(tmp_path)] == [1, 2]
    printed = capsys.readouterr().err
    assert "step 7/10  loss 0.1429" in printed and "\r" not in printed and "\x1b" not in printed


def test_in_a_terminal_the_bar_moves_and_held_out_lines_stay(tmp_path, monkeypatch):
    """Ten steps of two seconds, a log line at each fifth. Seen to fail with the bar moved by log lines alone."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    metrics = Metrics(tmp_path, total_steps=10)
    now = [metrics._bar.last_print_t]
    metrics._bar._time = lambda: now[0]
    for step in range(1, 11):
        now[0] += 2
        metrics.progress(step)
        if step % 5 == 0:
            metrics.log(step, {"eval/nats_per_pixel": 1 / step})
    metrics.close()
    shown = terminal.getvalue()
    assert all(f" {step}/10 " in shown for step in range(1, 11))
    assert "step 5/10  held-out 0.2000" in [line.split("  ETA")[0] for line in re.split(r"[\r\n]", shown)]


@pytest.mark.parametrize("bad", [b"5", b'"step"', b"\xff\xfe\x00", b'{"step": 2, "train/nats\xff": 1.0}',
                                 b'{"step": "2"}', b'{"step": 2, "resumed_from": null}', b'{"step": 2, "a": [1]}',
                                 b"[" * 9999])
def test_damaged_lines_are_set_aside_and_the_others_kept(tmp_path, bad, caplog):
    """A damaged line in the middle of the log of a run that resumes. Seen to fail with lines used unchecked."""
    run(tmp_path, 0, 2)
    file = tmp_path / "metrics.jsonl"
    first, second = file.read_bytes().splitlines()
    damaged = b"\n".join([first, bad, second]) + b"\n"
    file.write_bytes(damaged)
    assert [line["step"] for line in load_metrics(tmp_path)] == [1, 2]
    run(tmp_path, 2, 3)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged
    assert [message.endswith("its other lines are kept (1 are damaged).") for message in caplog.messages] == [True]


def test_a_folder_in_place_of_the_log_is_set_aside(tmp_path):
    """Seen to fail with an IsADirectoryError."""
    (tmp_path / "metrics.jsonl").mkdir()
    run(tmp_path, 0, 2)
    assert len(load_metrics(tmp_path)) == 2 and (tmp_path / "metrics.jsonl.damaged").is_dir()


def test_non_finite_values_are_null(tmp_path):
    metrics = Metrics(tmp_path, total_steps=1)
    metrics.log(1, {"a": math.nan, "b": math.inf, "c": np.float32(1.5)})
    metrics.close()
    (line,) = load_metrics(tmp_path)
    assert (line["a"], line["b"], line["c"]) == (None, None, 1.5)


def test_lines_of_one_step_are_merged_and_later_ones_win(tmp_path):
    """Logs in a bucket hold such lines, because nothing can be removed there."""
    lines = [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0, "b": 5.0}, {"step": 2, "a": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert load_metrics(tmp_path) == [{"step": 1, "a": 1.0}, {"step": 2, "a": 3.0, "b": 5.0}]


def test_chips_are_found_by_jax_names():
    assert topology.chip_for("TPU v5 lite").peak_bf16_flops == 197e12
    assert topology.chip_for("TPU v5p") is topology.chip_for("TPU v5")
    assert topology.chip_for("NVIDIA H200").hbm_bytes == 143_771 * 2**20
    assert topology.chip_for("NVIDIA H100 PCIe") is None and topology.chip_for("cpu") is None
    kinds = [kind for chip in topology.CHIPS for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))


def test_a_line_printed_while_another_is_printed_is_no_error(monkeypatch):
    """A signal's handler may print while a line is being printed; Python refuses the inner line with a RuntimeError.

    Seen to fail with that error, which ended a run that should have saved.
    """
    written, entered = [], []

    class Raw(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            if not entered:
                entered.append(True)
                say("inner")
            written.append(bytes(data))
            return len(data)

    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(Raw()), write_through=True))
    say("outer")
    say("next")
    assert entered and b"".join(written).split() == [b"outer", b"next"]
