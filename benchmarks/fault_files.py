"""Faults of files, for benchmarks/faults.py: full disks, damaged checkpoints, damaged pixel stores.

Each function takes a folder with a store, an undisturbed run, a random generator and the number of tries.
"""

import os
import pathlib
import random
import shutil
import subprocess

import numpy as np
from fault_runs import ROOT, Run, Tally


def disk(folder: pathlib.Path, reference: Run, rng: random.Random, tries: int) -> list[Tally]:
    """No file may grow beyond a few KB, as on a full disk: saves fail, training continues, and its exit code is 2.

    With room again, the run resumes. It loses only the lines of metrics that found no room.
    """
    full, again = Tally("no room to save: exit code 2, one line"), Tally("room again: resumes")
    for number in range(tries):
        run = Run(folder, f"disk{number}")
        run.ids = pathlib.Path(os.devnull)
        with subprocess.Popen(run.recording(most_bytes=rng.randint(2_000, 9_000)), cwd=ROOT, env=run.env,
                              stderr=subprocess.PIPE, text=True) as process:
            log = process.stderr.read()
        good = process.returncode == 2 and "could not be saved" in log.splitlines()[-1]
        full.add(good)
        if not good:
            print(f"  exit code {process.returncode}\n{log[:2500]}", flush=True)
        run.finish()
        wrong = [what for what in run.differences(reference) if what != "losses"]
        if not run.losses().items() <= reference.losses().items():
            wrong.append("losses")
        again.add(not wrong, lines_of_metrics=len(reference.losses()) - len(run.losses()))
        if wrong:
            print(f"  {wrong}", flush=True)
    return [full, again]


def damage(file: pathlib.Path, kind: str, rng: random.Random) -> bool:
    """Flips a bit, cuts off the end, zeroes up to 4 KiB, or deletes the file. Returns False if nothing changed."""
    data = before = bytearray(file.read_bytes())
    if kind == "deleted" or not data:
        file.unlink()
        return True
    data = bytearray(before)
    if kind == "flipped":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[rng.randrange(len(data)):]
    else:
        start = rng.randrange(max(1, len(data) - 4096))
        data[start:start + 4096] = bytes(len(data[start:start + 4096]))
    file.write_bytes(data)
    return data != before


def files(folder: pathlib.Path, reference: Run, rng: random.Random, tries: int) -> list[Tally]:
    """Damages each file of the newest checkpoint: it must be quarantined, and the step before restored."""
    from igpt_jax import checkpoint
    from igpt_jax.model.image_gpt import Model
    from igpt_jax.parallel import sharding
    from igpt_jax.storage import hashes
    from igpt_jax.training.steps import abstract_state

    record = checkpoint.load_metadata(str(reference.workdir))
    config, mesh = record.config, sharding.make_mesh(record.config.mesh)
    shape = Model(config.model, len(record.palette_VC), record.image_size, config.precision, mesh)
    abstract = abstract_state(shape, config, mesh)
    bits = {step: _bits(reference, step, abstract, record) for step in reference.checkpoints()[-2:]}
    older, newest = sorted(bits)
    tallies = []
    copy = folder / "damaged"
    names = [str(file.relative_to(reference.workdir / "checkpoints" / str(newest)))
             for file in sorted((reference.workdir / "checkpoints" / str(newest)).rglob("*")) if file.is_file()]
    for kind in ("flipped", "cut", "zeroed", "deleted"):
        tally = Tally(f"a file of a checkpoint {kind} ({len(names)} files)")
        for name in names:
            for _ in range(1 if kind == "deleted" else tries):
                shutil.rmtree(copy, ignore_errors=True)
                for step in bits:
                    shutil.copytree(reference.workdir / "checkpoints" / str(step), copy / "checkpoints" / str(step))
                if not damage(copy / "checkpoints" / str(newest) / name, kind, rng):
                    continue
                with checkpoint.Checkpoints(str(copy), config) as checkpoints:
                    state, stored = checkpoints.restore(lambda _: abstract, record)
                right = _equal(state, bits[stored.steps_done])
                # A killed run may leave a step without SHA256SUMS. Then only the arrays' own checksums are compared.
                unhashed = name == hashes.HASHES and not (copy / "quarantine").exists() and right
                tally.add(right and (stored.steps_done == older or unhashed), silent=int(not right),
                          without_fallback=int(stored.steps_done != older))
                if not right or stored.steps_done != older and not unhashed:
                    print(f"  {name} {kind}: restored step {stored.steps_done}, right: {right}", flush=True)
        tallies.append(tally)
    return tallies


def _bits(reference: Run, step: int, abstract: dict, record: object) -> list[bytes]:
    """The bytes of every array of a restored step."""
    import jax

    from igpt_jax import checkpoint

    with checkpoint.Checkpoints(str(reference.workdir), record.config) as checkpoints:
        state, _ = checkpoints.restore(lambda _: abstract, record, at=step)
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def _equal(state: dict, bits: list[bytes]) -> bool:
    import jax

    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)] == bits


def store(folder: pathlib.Path, reference: Run, rng: random.Random, tries: int) -> list[Tally]:
    """Damages each file of a pixel store: reading all of it must be an error, or give the right images."""
    from igpt_jax.config import UserError
    from igpt_jax.data.store import Store

    def read(path: pathlib.Path) -> list[bytes]:
        opened = Store.open(str(path))
        splits = [opened.split(name) for name in ("train", "held_out")]
        return [part.tobytes() for split in splits for part in (split.read(np.arange(split.count)),
                                                                split.labels(np.arange(split.count)))]

    right, copy, tallies = read(folder / "store"), folder / "damaged_store", []
    names = [str(file.relative_to(folder / "store")) for file in sorted((folder / "store").rglob("*"))
             if file.is_file() and file.name not in ("result.json", "config.json", ".lock")]
    for kind in ("flipped", "cut", "zeroed", "deleted"):
        tally = Tally(f"a file of a pixel store {kind} ({len(names)} files)")
        for name in names:
            for _ in range(1 if kind == "deleted" else tries):
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(folder / "store", copy)
                if damage(copy / name, kind, rng):
                    try:
                        silent = read(copy) != right
                    except UserError:
                        silent = False
                    tally.add(not silent, silent=int(silent))
                    if silent:
                        print(f"  {name} {kind}: other images, without an error", flush=True)
        tallies.append(tally)
    return tallies
