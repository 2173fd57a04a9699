"""The diagonal Gaussian that an encoder's moments describe. Arrays are NHWC."""

from __future__ import annotations

import math

import mlx.core as mx

LOGVAR_RANGE = (-30.0, 20.0)


class DiagonalGaussianDistribution:
    """q(z|x) = N(mean, diag(var)), from moments (N, h, w, 2C) that hold the mean and then the logvar.

    As diffusers' class of the same name. `kl` and `nll` sum in float32, whatever the dtype of the moments.
    """

    def __init__(self, moments: mx.array) -> None:
        if moments.ndim != 4 or moments.shape[-1] % 2:
            raise ValueError(f"moments: shape {moments.shape}, wanted (N, h, w, 2C)")
        self.moments = moments
        self.mean, logvar = mx.split(moments, 2, axis=-1)
        self.logvar = mx.clip(logvar, *LOGVAR_RANGE)

    @property
    def std(self) -> mx.array:
        return mx.exp(0.5 * self.logvar)

    @property
    def var(self) -> mx.array:
        return mx.exp(self.logvar)

    def mode(self) -> mx.array:
        """The most probable latent (N, h, w, C): the mean."""
        return self.mean

    def sample(self, key: mx.array | None = None) -> mx.array:
        """A latent (N, h, w, C); `key` is an `mx.random.key`, or None for MLX's global random state."""
        noise = mx.random.normal(self.mean.shape, dtype=self.mean.dtype, key=key)
        return self.mean + self.std * noise

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> mx.array:
        """KL(self || other) in nats, (N,): summed over space and channels. `other` defaults to N(0, 1)."""
        mean, logvar = self._float32()
        if other is None:
            return 0.5 * _sum(mean**2 + mx.exp(logvar) - 1 - logvar)
        other_mean, other_logvar = other._float32()
        ratio = mx.exp(logvar - other_logvar)
        distance = (mean - other_mean) ** 2 * mx.exp(-other_logvar)
        return 0.5 * _sum(distance + ratio - 1 - logvar + other_logvar)

    def nll(self, x: mx.array) -> mx.array:
        """-log q(x) in nats, (N,), of latents x (N, h, w, C)."""
        mean, logvar = self._float32()
        terms = math.log(2 * math.pi) + logvar + (x.astype(mx.float32) - mean) ** 2 * mx.exp(-logvar)
        return 0.5 * _sum(terms)

    def _float32(self) -> tuple[mx.array, mx.array]:
        return self.mean.astype(mx.float32), self.logvar.astype(mx.float32)


def _sum(x: mx.array) -> mx.array:
    """(N, h, w, C) -> (N,), axis by axis: one running sum over all of them would lose digits in float32."""
    return x.sum(axis=3).sum(axis=2).sum(axis=1)
