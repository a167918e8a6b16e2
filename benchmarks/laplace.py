"""Brackets log det of a Hessian of a million parameters, against the truth.

The Hessian has curvatures spread evenly in their logarithms, in random order, and a cosine transform turns it so that
every axis has a share of all of them.
"""

import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.fft import dct

import volumejax as vj
from volumejax import exact


class Turned(eqx.Module):
    """½ Σ hᵢ(Rw)ᵢ² with R a cosine transform."""

    h: jax.Array

    def __call__(self, w):
        """Return the cost."""
        return 0.5 * jnp.sum(self.h * jnp.square(dct(w, norm="ortho")))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dimension", type=int, default=10**6)
    parser.add_argument("--probes", type=int, default=8)
    dimension, probes = vars(parser.parse_args()).values()
    print("| condition | steps | floor | log det | bracket − truth | 3 SE | width | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for decades, num_steps, floor in ((3, 80, None), (5, 30, None), (5, 30, 0.0999), (5, 120, 0.0999)):
        h = np.logspace(-1, decades - 1, dimension)
        cost = Turned(jnp.asarray(np.random.default_rng(0).permutation(h), jnp.float32))
        spectrum = vj.LanczosSpectrum(num_probes=probes, num_steps=num_steps, floor=floor)
        began = time.perf_counter()
        estimate = vj.laplace_volume(
            jax.random.key(0), cost, jnp.zeros(dimension), vj.Lebesgue(), cutoff=0.01, spectrum=spectrum
        )
        seconds = time.perf_counter() - began
        truth, (low, high) = float(np.log(h).sum()), estimate.trace.log_det
        print(
            f"| 1e{decades} | {num_steps} | {'none' if floor is None else floor} | {truth:,.0f} | "
            f"[{low - truth:+,.0f}, {high - truth:+,.0f}] | {6.0 * float(estimate.trace.probe_error):,.0f} | "
            f"{100 * (high - low) / truth:.3g} % | {seconds:.0f} |",
            flush=True,
        )
        del cost
    truth = exact.ellipsoid(h, cutoff=0.01).log_mass
    print(f"\nlog volume {float(estimate.log_mass):,.0f} ± {float(estimate.std_error):,.0f}, exactly {truth:,.0f}")


if __name__ == "__main__":
    main()
