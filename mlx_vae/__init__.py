"""The image autoencoder of Stable Diffusion, SDXL, SD3 and FLUX for MLX."""

from mlx_vae.blas import load_fast_blas

BLAS_HINT = load_fast_blas()  # before mlx is imported: see blas.py

from mlx_vae.autoencoder import AutoencoderKL, AutoencoderKLOutput, DecoderOutput  # noqa: E402
from mlx_vae.config import AutoencoderKLConfig  # noqa: E402
from mlx_vae.posterior import DiagonalGaussianDistribution  # noqa: E402
from mlx_vae.version import __version__  # noqa: E402

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "AutoencoderKLOutput",
    "DecoderOutput",
    "DiagonalGaussianDistribution",
    "__version__",
]
