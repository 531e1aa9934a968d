"""Weights of OpenAI (TF1 checkpoints) and Hugging Face (safetensors) <-> our checkpoints, with a certificate.

Writes the weights where convert_to says, and certificate.json: SHA-256 of every tensor on both sides, the number of
parameters, and how far the logits of the two sides are apart.
"""

import contextlib
import ctypes
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

from igpt_jax import checkpoint, storage
from igpt_jax.config import ConvertConfig, ExportConfig, UserError
from igpt_jax.evaluation.probing import load_probe
from igpt_jax.metrics.logging import say
from igpt_jax.model import export
from igpt_jax.model.image_gpt import Model
from igpt_jax.model.sampling import Sampling
from igpt_jax.parallel.trees import by_name
from igpt_jax.storage import to_json
from igpt_jax.weights import (
    KINDS,
    huggingface,
    kind_and_path,
    open_weights,
    openai,
    ours,
    palette_for,
    refuse_non_square,
)
from igpt_jax.weights.certificate import certify, fixed_images, nats_per_pixel
from igpt_jax.weights.frameworks import fault_of_transformers
from igpt_jax.weights.names import Weights, finite, masked
from igpt_jax.weights.target import CERTIFICATE, Target


def run(config: ConvertConfig, workdir: str) -> dict[str, Any]:
    """Converts. Returns `parameters`, `max_logit_difference` (None where not compared) and where the weights are.

    Raises:
      UserError: the source is missing, damaged or no ImageGPT; the target is in the way; or the two sides differ.
    """
    _return_freed_memory()
    if jax.process_count() > 1:
        raise UserError("convert runs in one process. Start it without launch/local.sh and without srun.")
    source_kind, source_path = kind_and_path("convert_from", config.convert_from)
    target_kind, target_path = kind_and_path("convert_to", config.convert_to or f"orbax:{workdir}", [*KINDS, "export"])
    source = open_weights(source_kind, source_path, config.parameters)
    palette_VC = palette_for(source, config.convert_from, config.palette, "--config.palette")
    refuse_non_square(source, config.convert_from)
    head = {"pixels": huggingface.PIXELS, "classes": huggingface.CLASSES}[config.head]
    _refuse_unsupported(config, source, target_kind)

    certificate = {"from": f"{source_kind}:{source_path}", "to": f"{target_kind}:{target_path}"}
    target = Target(target_kind, target_path, source.steps_done, workdir)
    say(f"{certificate['from']} -> {certificate['to']}: {source.sizes['L']} layers, width "
                  f"{source.sizes['D']}, {source.sizes['V']} colors"
                  f"{', masked (BERT): there is no start vector' if masked(source) else ''}")
    with target.appearing({**certificate, "verdict": "unfinished"}) as folder:
        if target_kind == "openai":
            openai.write(source, str(folder / target.entry))
        elif target_kind == "orbax":
            ours.write(source, folder, palette_VC)
        elif target_kind == "huggingface":
            huggingface.write(source, folder, head, palette_VC, ours.dropout_of(source))
        else:
            identity = checkpoint.identity(str(source.path), config.parameters) if source_kind == "orbax" else ""
            _export(source, folder, palette_VC, config.export, identity)

    if target_kind == "export":
        certificate |= _certify_export(source, Path(target.folder))
    else:
        written = str(target.folder / target.entry) if target_kind == "orbax" else target.path
        certificate |= certify(source, open_weights(target_kind, written), config.certificate == "full")
    target.record(json.loads(to_json(certificate)))
    if certificate["verdict"] != "same":
        raise UserError(f"{_difference(certificate, source, 'huggingface' in (source_kind, target_kind))}. Do not use "
                        f"the converted weights; {storage.path(workdir) / CERTIFICATE} has the details.")
    return {"parameters": certificate["parameters"], "converted_to": certificate["to"],
            "max_logit_difference": max((each["max_difference"] for each in _compared(certificate)), default=None)}


def _return_freed_memory() -> None:
    """Has glibc give back every array of 1 MiB and more when it is freed; by itself it keeps two stacks of layers."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD, which then no longer grows


def _refuse_unsupported(config: ConvertConfig, source: Weights, target: str) -> None:
    """Refuses models that the target's format cannot represent, and missing heads that it needs."""
    given = config.convert_from
    if target == "huggingface" and masked(source):
        raise UserError(f"{given} is a masked (BERT) model; transformers' ImageGPT is always causal and would load it "
                        "as another model. Convert it to openai:PREFIX or orbax:DIR.")
    if target == "export" and masked(source):
        raise UserError(f"{given} is a masked (BERT) model, which cannot draw one pixel after the other, as an "
                        "exported sampler does. Convert it to openai:PREFIX or orbax:DIR.")
    if target == "export" and "head_VD" not in source.names:
        raise UserError(f"{given} holds no head for pixels, which an exported sampler needs. Convert it to orbax:DIR.")
    if target not in ("huggingface", "openai"):
        return
    with_classes = config.head == "classes" if target == "huggingface" else "class_head_KD" in source.names
    if with_classes and "class_head_KD" not in source.names:
        raise UserError(f"head=classes: {given} holds no class head. Leave head=pixels.")
    if with_classes and ours.class_layer_of(source) not in (-1, source.sizes["L"]):
        raise UserError(f"{given}: its class head reads layer {ours.class_layer_of(source)}, but {target}'s class head "
                        "reads the last layer. Convert it to orbax:DIR.")
    if "head_VD" not in source.names and not (target == "huggingface" and with_classes):
        fix = "Set --config.head=classes." if target == "huggingface" else "Convert it to orbax:DIR."
        raise UserError(f"{given} holds no head for pixels. {fix}")


def _export(source: Weights, folder: Path, palette_VC: Any, config: ExportConfig, identity: str) -> None:
    record = ours.record_for(source, palette_VC)
    if config.rows >= record.image_size:
        raise UserError(f"export.rows={config.rows} leaves nothing to draw of {record.image_size} rows. Give fewer.")
    model = Model(dataclasses.replace(record.config.model, attention="reference"), len(palette_VC), record.image_size,
                  "float32")
    sampling = Sampling(config.temperature, config.top_k, config.top_p)
    probe, layer = _probe_for(config, model, identity) if config.probe else ({}, 0)
    for name, program in export.programs(model, config.rows * record.image_size, sampling, config.platforms, probe,
                                         layer).items():
        (folder / f"{name}.jax").write_bytes(program)
    weights = by_name(ours.parameters(source, lambda shape, name: np.empty(shape, np.float32)))
    weights = {name: weights[name] for name in by_name(model.abstract_parameters())}
    np.savez(folder / "weights.npz", **weights, **probe)
    np.save(folder / "palette.npy", palette_VC)
    (folder / "run.py").write_text(export.RUN)


def _probe_for(config: ExportConfig, model: Model, identity: str) -> tuple[dict[str, np.ndarray], int]:
    """The arrays of a probe by their exported names, and the layer that it reads."""
    saved = load_probe(config.probe)
    if saved.kind != "normalized" or not saved.fits(model.dims, identity):
        raise UserError(f"export.probe={config.probe} reads {len(saved.probe.mean_D)} {saved.kind} features of layer "
                        f"{saved.layer}, and is of another checkpoint or of features that are not exported. Probe this "
                        "checkpoint with features=normalized.")
    return {f"probe/{name}": finite(f"export.probe={config.probe}", name, array)
            for name, array in dataclasses.asdict(saved.probe).items()}, saved.layer


def _certify_export(source: Weights, folder: Path) -> dict[str, Any]:
    """Compares the loss of the exported program with the source framework's, on images of random colors."""
    tokens_BT, _ = fixed_images(source)
    losses = jax.export.deserialize(bytearray((folder / "losses.jax").read_bytes()))
    with np.load(folder / "weights.npz") as file:
        weights = dict(file)
    parameters = sum(array.size for name, array in weights.items() if not name.startswith("probe/"))
    certificate = {"parameters": parameters, "verdict": "same"}
    logits_BTV = source.outputs(tokens_BT, None).get("pixels")
    if logits_BTV is not None and jax.default_backend() in (name.replace("cuda", "gpu") for name in losses.platforms):
        nats = {"source": nats_per_pixel(logits_BTV, tokens_BT),
                "target": float(np.mean(losses.call(weights, tokens_BT.astype(np.int32))))}
        certificate["nats_per_pixel"] = nats
        certificate["verdict"] = "same" if abs(nats["source"] - nats["target"]) < 1e-4 else "differs"
    return certificate


def _difference(certificate: dict[str, Any], source: Weights, transformers: bool) -> str:
    """What is wrong, where the two sides differ; `transformers` has computed one of them."""
    differing, compared = certificate.get("differing"), _compared(certificate)
    fault = fault_of_transformers(source.sizes["H"]) if transformers and not differing else ""
    figures = [*certificate.get("nats_per_pixel", {}).values(), *(each["max_difference"] for each in compared)]
    if fault:
        return f"the two sides cannot be compared: {fault}"
    if not differing and not all(map(math.isfinite, figures)):
        return "the logits are not finite, though the weights are: they are so large that computing overflows"
    not_the_same = "the converted weights are not the same model:"
    if differing:
        return f"{not_the_same} {len(differing)} parameters differ, the first of them {differing[0]}"
    if not compared:
        return f"{not_the_same} their losses are {certificate['nats_per_pixel']}"
    worst = max(compared, key=lambda each: each["max_difference"] / each["limit"])
    return f"{not_the_same} their logits are {worst['max_difference']:.3g} apart (limit {worst['limit']:.3g})"


def _compared(certificate: dict[str, Any]) -> list[dict[str, Any]]:
    """The certificate's entry of each head whose logits were compared."""
    heads = (certificate.get(name, {}) for name in ("logits", "class_logits"))
    return [head for head in heads if head.get("compared")]
