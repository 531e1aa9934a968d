"""Converts weights between OpenAI's and Hugging Face's files and our checkpoints.

    igpt convert --config=convert --workdir=runs/igpt_s \
        --config.convert_from=openai:models/s/model.ckpt-1000000 --config.palette=kmeans_centers.npy
    igpt convert --config=convert --workdir=runs/export \
        --config.convert_from=orbax:runs/pretrain --config.convert_to=huggingface:models/mine
"""

from igpt_jax.config import base_config


def get_config(arguments: str = ""):
    return base_config("convert", arguments)
