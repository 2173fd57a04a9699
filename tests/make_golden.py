"""Writes tests/data/golden.safetensors: what diffusers answers for small random models. Needs the parity extra.

python tests/make_golden.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from models import random_config, random_images, random_latent_shape, random_latents
from reference import answers, reference_model
from safetensors.numpy import save_file

PATH = Path(__file__).parent / "data" / "golden.safetensors"
SEEDS = range(100, 116)


def main() -> None:
    tensors: dict[str, np.ndarray] = {}
    configs = {}
    for seed in SEEDS:
        config = random_config(seed)
        shape = random_latent_shape(config, seed)
        z = random_latents((1, *shape[1:]), seed)
        factor = config.factor
        x = random_images((1, shape[1] * factor, shape[2] * factor, config.in_channels), seed)
        for name, value in answers(reference_model(config, seed), z, x).items():
            tensors[f"{seed}.{name}"] = value
        configs[seed] = config.to_dict()
    save_file(tensors, PATH, metadata={"configs": json.dumps(configs)})
    print(f"{PATH}: {PATH.stat().st_size / 2**10:.0f} KiB")


if __name__ == "__main__":
    main()
