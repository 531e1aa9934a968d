"""Converts weights between OpenAI's and Hugging Face's files and our checkpoints.

    python -m igpt_jax convert --config=configs/convert.py --workdir=runs/igpt_s \
        --config.convert_from=openai:models/s/model.ckpt-1000000 --config.palette=kmeans_centers.npy
    python -m igpt_jax convert --config=configs/convert.py --workdir=runs/export \
        --config.convert_from=orbax:runs/pretrain --config.convert_to=huggingface:models/mine
"""

from igpt_jax.config import base_config


def get_config(arguments: str = ""):
    return base_config("convert", arguments)
