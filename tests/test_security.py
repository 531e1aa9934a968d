"""Attacks by untrusted files: they run no code, write only into the workdir, and take little memory.

Each attack is a function (folder, canary) that makes its files in `folder` and returns the job that reads them and the
job's settings; `canary` is a path that only attacking code would create. All jobs run in one process, so that its peak
memory is the peak of all.
"""

import io
import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from conftest import ROOT, run_job_command
from PIL import Image

from igpt_jax.storage import hashes

DATA = ROOT / "tests" / "data"
NESTED = "[" * 2_000_000


class Canary:
    """Runs code when it is unpickled: creates a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def python_file(canary):
    return f"import os\nos.mkdir({str(canary)!r})\n"


def pickled_palette(folder, canary):
    np.save(folder / "palette.npy", np.array([Canary(canary)] * 4, object), allow_pickle=True)
    return ["prepare", "source=synthetic:8", "image_size=4", f"palette={folder}/palette.npy"]


def pickled_palette_without_a_header(folder, canary):
    (folder / "palette.npy").write_bytes(pickle.dumps(Canary(canary)))
    return ["prepare", "source=synthetic:8", "image_size=4", f"palette={folder}/palette.npy"]


def pickled_images(folder, canary):
    np.savez(folder / "a.npz", images=np.array([Canary(canary)] * 4, object), allow_pickle=True)
    return ["prepare", f"source=npz:{folder}/a.npz", "image_size=4"]


def pickled_labels(folder, canary):
    np.savez(folder / "a.npz", images=np.zeros((4, 4, 4, 3), np.uint8), labels=np.array([Canary(canary)] * 4, object))
    return ["prepare", f"source=npz:{folder}/a.npz", "image_size=4"]


def pickled_tokens(folder, canary):
    np.save(folder / "tokens.npy", np.array([Canary(canary)] * 4, object), allow_pickle=True)
    return ["evaluate", f"checkpoints={checkpoint(folder)}", f"tokens={folder}/tokens.npy"]


def pickled_weights(folder, canary):
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    return ["convert", f"convert_from=huggingface:{folder}"]


def archive_bomb(folder, canary):
    """The header announces 100 GB of images; the file holds 50 KB that unpack to 50 MB."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**25, 32, 32, 3)})
    with zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("images.npy", "w", force_zip64=True) as member:
            member.write(header.getvalue())
            for _ in range(50):
                member.write(bytes(2**20))
    return ["prepare", f"source=npz:{folder}/a.npz", "image_size=4"]


def header_bomb(folder, canary):
    """A NumPy header of nested brackets, which exhaust Python's parser."""
    text = ("(" * 30_000).encode()
    (folder / "palette.npy").write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text)
    return ["prepare", "source=synthetic:8", "image_size=4", f"palette={folder}/palette.npy"]


def picture(seed):
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(data, "PNG")
    return data.getvalue()


def picture_bomb(folder, canary):
    """60,000 x 60,000 pixels in 10 MB, among good pictures: goes to quarantine."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    rows = b"".join([packer.compress(bytes(2**20)) for _ in range(2000)] + [packer.flush()])
    (folder / "pictures").mkdir()
    (folder / "pictures" / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    for seed in range(8):
        (folder / "pictures" / f"{seed}.png").write_bytes(picture(seed))
    return ["prepare", f"source=folder:{folder}/pictures", "image_size=4", "max_quarantined=0.5", "palette=fit:4"]


def tar_that_leads_out(folder, canary):
    """Paths out of the archive, links and devices: all go to quarantine."""
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name in (str(canary) + ".png", "../../canary.png", *(f"{seed}.png" for seed in range(8))):
            info, data = tarfile.TarInfo(name), picture(len(name))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for kind, name in ((tarfile.SYMTYPE, "link.png"), (tarfile.LNKTYPE, "hard.png"), (tarfile.CHRTYPE, "dev.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    return ["prepare", f"source=tar:{folder}/a.tar", "image_size=4", "max_quarantined=0.9", "palette=fit:4"]


def safetensors_header_bomb(folder, canary):
    """A header of 2^60 bytes."""
    return safetensors(folder, struct.pack("<Q", 2**60) + b"{}")


def safetensors_shape_bomb(folder, canary):
    """A tensor of 2^50 elements without any data."""
    header = json.dumps({"transformer.wte.weight": {"dtype": "F32", "shape": [2**25, 2**25],
                                                    "data_offsets": [0, 2**52]}}).encode()
    return safetensors(folder, struct.pack("<Q", len(header)) + header)


def safetensors(folder, data):
    (folder / "config.json").write_text(json.dumps({
        "model_type": "imagegpt", "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 16, "vocab_size": 5}))
    (folder / "model.safetensors").write_bytes(data)
    return ["convert", f"convert_from=huggingface:{folder}"]


def nested_weights_config(folder, canary):
    arguments = safetensors(folder, b"")
    (folder / "config.json").write_text(NESTED)
    return arguments


def checkpoint(folder):
    shutil.copytree(DATA / "pretrain_format2", folder / "run")
    return folder / "run" / "checkpoints" / "30"


def verify(step):
    return ["verify", f"path={step}"]


def sample(step):
    return ["sample", f"checkpoint={step}", "count=1", "examples=0"]


def python_in_a_checkpoint(folder, canary):
    step = checkpoint(folder)
    for name in ("config.py", "__init__.py", "sitecustomize.py", "params/__init__.py"):
        (step / name).write_text(python_file(canary))
        (folder / "run" / os.path.basename(name)).write_text(python_file(canary))
    return sample(step)


def nested_metadata(folder, canary):
    step = checkpoint(folder)
    (step / "_CHECKPOINT_METADATA").write_text(NESTED)
    return sample(step)


def large_metadata(folder, canary):
    step = checkpoint(folder)
    with open(step / "_CHECKPOINT_METADATA", "wb") as file:
        file.truncate(2**33)
    return sample(step)


def metadata_of_a_huge_model(folder, canary):
    """With a valid CRC, which an attacker can compute too."""
    step = checkpoint(folder)
    (step / hashes.HASHES).unlink()
    value = json.loads((step / "_CHECKPOINT_METADATA").read_text())
    metadata = hashes.unsealed(value["custom_metadata"], "metadata")
    metadata["config"]["model"] |= {"embed": 2**20, "heads": 2**10, "layers": 2**10}
    value["custom_metadata"] = hashes.sealed(metadata)
    (step / "_CHECKPOINT_METADATA").write_text(json.dumps(value))
    return sample(step)


def hashes_that_lead_out(folder, canary):
    step = checkpoint(folder)
    (step / hashes.HASHES).write_text(f"{'0' * 64}  ../../../../../../../../dev/zero\n")
    return verify(step)


def hashes_of_other_files(folder, canary):
    step = checkpoint(folder)
    (step / hashes.HASHES).write_text(f"{'0' * 64}  /dev/zero\n")
    return verify(step)


def link_in_a_checkpoint(folder, canary):
    step = checkpoint(folder)
    (step / "params" / "more").symlink_to("/dev/zero")
    return verify(step)


def pipe_in_a_checkpoint(folder, canary):
    """Opening a pipe would block for ever."""
    step = checkpoint(folder)
    os.mkfifo(step / "params" / "more")
    (step / hashes.HASHES).write_text(f"{'0' * 64}  params/more\n")
    return verify(step)


def nested_manifest(folder, canary):
    shutil.copytree(DATA / "store_format2", folder / "store")
    (folder / "store" / "manifest.json").write_text(NESTED)
    return ["verify", f"path={folder}/store"]


def manifest_that_leads_out(folder, canary):
    shutil.copytree(DATA / "store_format2", folder / "store")
    shutil.move(folder / "store" / "train", folder / "elsewhere")
    manifest = json.loads((folder / "store" / "manifest.json").read_text())
    manifest["splits"]["train"]["parts"][0]["folder"] = "../elsewhere"
    (folder / "store" / "manifest.json").write_text(json.dumps(manifest))
    return ["verify", f"path={folder}/store"]


BAD_INPUT = (pickled_palette, pickled_palette_without_a_header, pickled_images, pickled_labels, pickled_tokens,
             pickled_weights, archive_bomb, header_bomb, safetensors_header_bomb, safetensors_shape_bomb,
             nested_weights_config, nested_metadata, large_metadata, metadata_of_a_huge_model, hashes_that_lead_out,
             hashes_of_other_files, link_in_a_checkpoint, pipe_in_a_checkpoint, nested_manifest,
             manifest_that_leads_out)
HARMLESS = (picture_bomb, tar_that_leads_out, python_in_a_checkpoint)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(exit codes by attack, peak memory in bytes, stderr, files that appeared outside of workdirs)."""
    folder = tmp_path_factory.mktemp("attacks")
    rows = []
    for attack in (*BAD_INPUT, *HARMLESS):
        own = folder / attack.__name__
        own.mkdir()
        job, *settings = attack(own, folder / "canary")
        rows.append((attack.__name__, job, str(own / "workdir"), settings))
    (folder / "rows.json").write_text(json.dumps(rows))
    before = files(folder)
    job = run_job_command(folder / "rows.json", script="attacked_jobs.py")
    assert job.returncode == 0, job.stderr
    codes, peak = json.loads(job.stdout.splitlines()[-1])
    return codes, peak, job.stderr, files(folder) - before


def files(folder):
    return {path for path in folder.rglob("*") if "workdir" not in path.parts}


@pytest.mark.parametrize("attack", [*BAD_INPUT, *HARMLESS], ids=lambda attack: attack.__name__)
def test_each_attack_is_refused_or_skipped(done, attack):
    codes, _, printed, _ = done
    assert codes[attack.__name__] == (2 if attack in BAD_INPUT else 0), printed


def test_no_code_ran_no_file_was_written_and_memory_stayed_small(done):
    """Peak memory with JAX and all jobs is at most 1 GiB."""
    _, peak, _, appeared = done
    assert not appeared and not any((parent / "canary.png").exists() for parent in ROOT.parents)
    assert peak < 2**30, f"{peak / 2**20:.0f} MiB"
    print(f"peak memory {peak / 2**20:.0f} MiB", file=sys.stderr)
